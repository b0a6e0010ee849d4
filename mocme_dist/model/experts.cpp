// All experts, relu(x A + b) B + c (+ x), and their gradients, hidden units never stored: a block of ROWS rows passes both
// layers in the first caches, forward and again backward. Products are what products.h makes of the flags: bfloat16 by
// AMX with float32 sums, or float32. The width is a multiple of PAD. Results do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "products.h"

using namespace mocme;

constexpr int64_t W = LANES;
constexpr int64_t CHUNK = 16 * ROWS;  // rows of an expert that a thread takes at a time

// Rows [first, first + count) of (rows, D) as elements; rows past the end are zeros.
static void take_rows(Element* out, const float* from, int64_t count, int64_t D) {
  for (int64_t at = 0; at < count * D; at += W) store(out + at, load(from + at));
  std::memset(static_cast<void*>(out + count * D), 0, (ROWS - count) * D * sizeof(Element));
}

// Hidden units of a block: relu(rows A + b); rows past the end are zeros.
static void hide_rows(Element* hidden, float* product, const Element* rows, const Element* first, const float* bias, int64_t count, int64_t D) {
  multiply(product, rows, first, D, D);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < D; d += W) store(hidden + i * D + d, relu(add(load(product + i * D + d), load(bias + d))));
  std::memset(static_cast<void*>(hidden + count * D), 0, (ROWS - count) * D * sizeof(Element));
}

extern "C" {

int64_t mocme_experts_pad() { return PAD; }

// x (M, U, D), first (M, D, K D), first_bias (M, K D), second (M K, D, D), second_bias (M K, D) -> views (M, K, U, D)
void mocme_experts_forward(const float* x, const float* first, const float* first_bias, const float* second, const float* second_bias,
                           float* views, int64_t M, int64_t K, int64_t U, int64_t D, int64_t residual, int32_t threads) {
  const int64_t chunks = (U + CHUNK - 1) / CHUNK, size = D * D;
  Buffer<Element> packed(2 * M * K * size);
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const Tiles tiles;
    Buffer<Element> rows(ROWS * D), hidden(ROWS * D);
    Buffer<float> product(ROWS * D);
#pragma omp for schedule(static)
    for (int64_t e = 0; e < M * K; ++e) {
      pack(packed.data + 2 * e * size, first + e / K * D * K * D + e % K * D, D, D, K * D, 1);
      pack(packed.data + (2 * e + 1) * size, second + e * size, D, D, D, 1);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < M * K * chunks; ++item) {
      const int64_t e = item / chunks, m = e / K, last = std::min(U, (item % chunks + 1) * CHUNK);
      for (int64_t begin = item % chunks * CHUNK; begin < last; begin += ROWS) {
        const int64_t count = std::min(ROWS, last - begin);
        const float* from = x + (m * U + begin) * D;
        float* to = views + (e * U + begin) * D;
        take_rows(rows.data, from, count, D);
        hide_rows(hidden.data, product.data, rows.data, packed.data + 2 * e * size, first_bias + e * D, count, D);
        multiply(product.data, hidden.data, packed.data + (2 * e + 1) * size, D, D);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t d = 0; d < D; d += W) {
            Vec value = add(load(product.data + i * D + d), load(second_bias + e * D + d));
            if (residual) value = add(value, load(from + i * D + d));
            store(to + i * D + d, value);
          }
      }
    }
  }
}

// slope (M, K, U, D) of the views -> gradients of all inputs, which come as zeros
void mocme_experts_backward(const float* x, const float* first, const float* first_bias, const float* second, const float* slope, float* x_grad,
                            float* first_grad, float* first_bias_grad, float* second_grad, float* second_bias_grad, int64_t M, int64_t K,
                            int64_t U, int64_t D, int64_t residual, int32_t threads) {
  const int64_t blocks = (U + ROWS - 1) / ROWS, size = D * D, wide = K * D;
  Buffer<Element> turned(M * K * size), pulls(M * K * blocks * ROWS * D);  // first layers transposed; slopes of hidden units
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const Tiles tiles;
    constexpr int64_t MOST = BLOCKS * ROWS;
    Buffer<Element> rows(MOST * D), hidden(MOST * D), packed(MOST * D), slopes(ROWS * D), first_packed(size), second_turned(size);
    Buffer<float> product(MOST * D), sums(2 * size);
    // An expert is one thread's: its weights' gradients are summed in the second cache.
#pragma omp for schedule(static)
    for (int64_t e = 0; e < M * K; ++e) {
      const int64_t m = e / K;
      const float* own = first + m * D * wide + e % K * D;
      pack(first_packed.data, own, D, D, wide, 1);
      pack(turned.data + e * size, own, D, D, 1, wide);
      pack(second_turned.data, second + e * size, D, D, 1, D);
      std::memset(sums.data, 0, 2 * size * sizeof(float));
      float *to_first = first_bias_grad + e * D, *to_second = second_bias_grad + e * D;
      for (int64_t block = 0; block < blocks; block += BLOCKS) {
        const int64_t together = std::min(BLOCKS, blocks - block);
        for (int64_t b = 0; b < together; ++b) {
          const int64_t begin = (block + b) * ROWS, count = std::min(ROWS, U - begin), at = b * ROWS * D;
          const float* from = slope + (e * U + begin) * D;
          float* own_slope = product.data + at;
          take_rows(rows.data + at, x + (m * U + begin) * D, count, D);
          hide_rows(hidden.data + at, own_slope, rows.data + at, first_packed.data, first_bias + e * D, count, D);
          std::memcpy(own_slope, from, count * D * sizeof(float));
          std::memset(own_slope + count * D, 0, (ROWS - count) * D * sizeof(float));
          pack(packed.data + at, own_slope, ROWS, D, D, 1);
          for (int64_t i = 0; i < count; ++i) for (int64_t d = 0; d < D; d += W) store(to_second + d, add(load(to_second + d), load(from + i * D + d)));
        }
        accumulate(sums.data + size, hidden.data, D, D, packed.data, D, together);
        for (int64_t b = 0; b < together; ++b) {
          const int64_t at = b * ROWS * D;
          float* pull = product.data + at;
          Element* kept = pulls.data + (e * blocks + block + b) * ROWS * D;
          take_rows(slopes.data, pull, ROWS, D);
          multiply(pull, slopes.data, second_turned.data, D, D);
          for (int64_t i = 0; i < ROWS; ++i)
            for (int64_t d = 0; d < D; d += W) {
              const Vec value = where_positive(load(hidden.data + at + i * D + d), load(pull + i * D + d));
              store(pull + i * D + d, value), store(kept + i * D + d, value);
              store(to_first + d, add(load(to_first + d), value));
            }
          pack(packed.data + at, pull, ROWS, D, D, 1);
        }
        accumulate(sums.data, rows.data, D, D, packed.data, D, together);
      }
      for (int64_t d = 0; d < D; ++d) std::memcpy(first_grad + m * D * wide + d * wide + e % K * D, sums.data + d * D, D * sizeof(float));
      std::memcpy(second_grad + e * size, sums.data + size, size * sizeof(float));
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < M * blocks; ++item) {
      const int64_t m = item / blocks, begin = item % blocks * ROWS, count = std::min(ROWS, U - begin);
      float* to = x_grad + (m * U + begin) * D;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t e = m * K + k;
        multiply(product.data, pulls.data + (e * blocks + item % blocks) * ROWS * D, turned.data + e * size, D, D);
        const float* straight = slope + (e * U + begin) * D;
        for (int64_t at = 0; at < count * D; at += W) {
          Vec value = add(load(to + at), load(product.data + at));
          if (residual) value = add(value, load(straight + at));
          store(to + at, value);
        }
      }
    }
  }
}

}  // extern "C"
