// MINE's statistics networks, T = w . relu(W relu(A x + B y + b) + c) on pairs of views, and their gradients.
//
// A block of ROWS rows passes through all layers in the first caches, forward and again backward: nothing of a pair's rows
// and hidden units is ever stored. Products are what products.h makes of the flags: bfloat16 by AMX, or float32. Rows that
// train come first in the kernels' own order. Widths D and H are padded with zeros to multiples of PAD by the caller.
// Sums are added in an order that depends on the number of threads alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "products.h"

using namespace mocme;

constexpr int64_t W = LANES;

extern "C" {

// S views of V rows, T of which train, P pairs; what lies in memory of each. Filled in by the caller, field by field.
struct Networks {
  int64_t S, V, T, P, D, H, width;  // D and H padded, width of the views
  int64_t threads, halves, low;     // halves: the rows from T on estimate, else all do both; low: views are bfloat16
  double clip;                      // of T inside exp; infinite is none
  const void* view;                 // (S, V, width)
  const uint8_t *present, *held_out;  // (S, V), (V)
  const float *center, *inverse;    // (S, width)
  const int64_t *left, *right;      // (P) views
  const float *first, *bias, *second, *second_bias, *last;  // (S, D, 2 H), (P, H), (P, H, H), (P, H), (P, H)
  Element *trained, *sides;         // (S, T, D) standardised, (S, V, 2 H)
  int32_t* next;                    // (P, V) marginal partners; -1 where the pair is not present
  double* exps;                     // (P, T)
  double* sums;                     // (6, P): rows, T, exp of those that train, then of those that estimate; (S) rows; (2, S, width)
  const float* slopes;              // (2, P) of T and of exp T
  float *first_grad, *bias_grad, *second_grad, *second_bias_grad, *last_grad;
};

}  // extern "C"

// Matrices packed for products, one after another; made by the threads of a parallel region together.
struct Packed {
  Buffer<Element> data;
  int64_t count, K, N;
  Packed(int64_t count, int64_t K, int64_t N) : data(count * K * N), count(count), K(K), N(N) {}
  void take(const float* from, bool transposed) {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; ++i) pack(data.data + i * K * N, from + i * K * N, K, N, transposed ? 1 : N, transposed ? K : 1);
  }
  const Element* at(int64_t i) const { return data.data + i * K * N; }
};

// Where each row stands in the order of the kernels: those that train, then the others.
static std::vector<int64_t> place_rows(const Networks& n) {
  std::vector<int64_t> place(n.V);
  int64_t next[2] = {0, n.T};
  for (int64_t v = 0; v < n.V; ++v) place[v] = next[n.halves && n.held_out[v]]++;
  return place;
}

// The next row, cyclically, of each half's rows that have both views of pair p.
static void shift_rows(const Networks& n, const std::vector<int64_t>& place, int64_t p) {
  int32_t* next = n.next + p * n.V;
  const uint8_t *left = n.present + n.left[p] * n.V, *right = n.present + n.right[p] * n.V;
  int64_t first[2] = {-1, -1}, last[2] = {-1, -1};
  for (int64_t v = 0; v < n.V; ++v) {
    const int64_t at = place[v], half = at >= n.T;
    next[at] = -1;
    if (!left[v] || !right[v]) continue;
    if (last[half] >= 0) next[last[half]] = static_cast<int32_t>(at);
    else first[half] = at;
    last[half] = at;
  }
  for (int half = 0; half < 2; ++half)
    if (last[half] >= 0) next[last[half]] = static_cast<int32_t>(first[half]);
}

// Numbers of a view, which are float32 or bfloat16.
inline Vec take(const float* p) { return load(p); }
inline Vec take(const Low* p) { return load_low(p); }
inline float take_one(const float* p) { return *p; }
inline float take_one(const Low* p) { return low_float(*p); }

// Standardised rows [first, first + count) of view s; adds to the sums of the present rows and of their squares.
template <typename View>
static void standardise_block(Element* out, float* sums, const Networks& n, int64_t s, int64_t first, int64_t count) {
  float *total = sums, *square = sums + n.D;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = s * n.V + first + i;
    const View* from = static_cast<const View*>(n.view) + at * n.width;
    const float present = n.present[at] ? 1.0f : 0.0f;
    const float *center = n.center + s * n.width, *inverse = n.inverse + s * n.width;
    int64_t d = 0;
    for (; d + W <= n.width; d += W) {
      const Vec x = take(from + d), counted = mul(fill(present), x);
      store(total + d, add(load(total + d), counted)), store(square + d, fma(counted, x, load(square + d)));
      store(out + i * n.D + d, mul(sub(x, load(center + d)), load(inverse + d)));
    }
    for (; d < n.width; ++d) {
      const float x = take_one(from + d);
      total[d] += present * x, square[d] += present * x * x;
      put(out + i * n.D, d, (x - center[d]) * inverse[d]);
    }
  }
}

// relu(l + r + b) of `count` rows from `first`, the right row beside its left one or its partner; rows past the end are zeros.
static void first_layer(Element* hidden, const Networks& n, int64_t p, int64_t first, int64_t count, bool marginal) {
  const Element* left = n.sides + n.left[p] * n.V * 2 * n.H;
  const Element* right = n.sides + n.right[p] * n.V * 2 * n.H + n.H;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t v = first + i, next = n.next[p * n.V + v], partner = marginal && next >= 0 ? next : v;
    for (int64_t h = 0; h < n.H; h += W) {
      const Vec sum = add(add(load(left + v * 2 * n.H + h), load(right + partner * 2 * n.H + h)), load(n.bias + p * n.H + h));
      store(hidden + i * n.H + h, relu(sum));
    }
  }
  std::memset(static_cast<void*>(hidden + count * n.H), 0, (ROWS - count) * n.H * sizeof(Element));
}

// T of rows that passed the first layer; `product` is work space.
static void second_layer(float* out, float* product, const Element* hidden, const Networks& n, const Packed& second, int64_t p, int64_t count) {
  multiply(product, hidden, second.at(p), n.H, n.H);
  for (int64_t i = 0; i < count; ++i) {
    Vec sum = zero();
    for (int64_t h = 0; h < n.H; h += W)
      sum = fma(relu(add(load(product + i * n.H + h), load(n.second_bias + p * n.H + h))), load(n.last + p * n.H + h), sum);
    out[i] = total(sum);
  }
}

// Gradients of a thread's rows.
struct Sums {
  Buffer<float> second, bias, second_bias, last;
  explicit Sums(const Networks& n) : second(n.P * n.H * n.H, true), bias(n.P * n.H, true), second_bias(n.P * n.H, true), last(n.P * n.H, true) {}
};

// Work space of a thread.
struct Space {
  Buffer<Element> hidden, pull, packed;
  Buffer<float> product, slope;
  explicit Space(int64_t H) : hidden(ROWS * H), pull(ROWS * H), packed(ROWS * H), product(ROWS * H), slope(ROWS) {}
};

// From slopes of T to the gradient of the first layer's sums, in space.product; adds to the weights' gradients.
static void pull_block(Space& space, Sums& sums, const Networks& n, const Packed& second, const Packed& transposed, int64_t p, int64_t count) {
  const int64_t H = n.H;
  multiply(space.product.data, space.hidden.data, second.at(p), H, H);
  for (int64_t h = 0; h < H; h += W) {
    const Vec bias = load(n.second_bias + p * H + h), last = load(n.last + p * H + h);
    Vec to_last = load(sums.last.data + p * H + h), to_bias = load(sums.second_bias.data + p * H + h);
    for (int64_t i = 0; i < count; ++i) {
      const Vec slope = fill(space.slope.data[i]), value = relu(add(load(space.product.data + i * H + h), bias));
      const Vec pull = where_positive(value, mul(slope, last));
      to_last = fma(slope, value, to_last), to_bias = add(to_bias, pull);
      store(space.pull.data + i * H + h, pull), store(space.product.data + i * H + h, pull);
    }
    store(sums.last.data + p * H + h, to_last), store(sums.second_bias.data + p * H + h, to_bias);
  }
  std::memset(static_cast<void*>(space.pull.data + count * H), 0, (ROWS - count) * H * sizeof(Element));
  std::memset(space.product.data + count * H, 0, (ROWS - count) * H * sizeof(float));
  pack(space.packed.data, space.product.data, ROWS, H, H, 1);
  accumulate(sums.second.data + p * H * H, space.hidden.data, H, H, space.packed.data, H);
  multiply(space.product.data, space.pull.data, transposed.at(p), H, H);
  for (int64_t h = 0; h < H; h += W) {
    Vec to_bias = load(sums.bias.data + p * H + h);
    for (int64_t i = 0; i < count; ++i) {
      const Vec pull = where_positive(load(space.hidden.data + i * H + h), load(space.product.data + i * H + h));
      store(space.product.data + i * H + h, pull);
      to_bias = add(to_bias, pull);
    }
    store(sums.bias.data + p * H + h, to_bias);
  }
}

static void add_row(float* to, const float* from, int64_t H) {
  for (int64_t h = 0; h < H; h += W) store(to + h, add(load(to + h), load(from + h)));
}

// Gradients of right rows that another block holds: the last row of a block that has a pair is followed by one of them.
struct Strays {
  Buffer<int64_t> row;  // (blocks, P), -1 where there is none
  Buffer<float> pull;   // (blocks, P, H)
  Strays(int64_t blocks, const Networks& n) : row(blocks * n.P), pull(blocks * n.P * n.H) { std::fill_n(row.data, blocks * n.P, -1); }
};

// Gradients of the sides of one block of rows, (S, ROWS, 2 H), and what falls outside of it.
static void pull_sides(float* grad, int64_t* stray_row, float* stray_pull, Space& space, Sums& sums, const Networks& n, const Packed& second,
                       const Packed& transposed, int64_t first, int64_t count) {
  const int64_t H = n.H;
  std::memset(grad, 0, n.S * ROWS * 2 * H * sizeof(float));
  for (int64_t item = 0; item < 2 * n.P; ++item) {
    const int64_t p = item / 2;
    const bool marginal = item % 2;
    const int32_t* next = n.next + p * n.V + first;
    for (int64_t i = 0; i < count; ++i) {
      const double slope = marginal ? n.slopes[n.P + p] * n.exps[p * n.T + first + i] : n.slopes[p];
      space.slope.data[i] = next[i] < 0 ? 0.0f : static_cast<float>(slope);
    }
    first_layer(space.hidden.data, n, p, first, count, marginal);
    pull_block(space, sums, n, second, transposed, p, count);
    for (int64_t i = 0; i < count; ++i) {
      if (next[i] < 0) continue;
      const float* pull = space.product.data + i * H;
      add_row(grad + (n.left[p] * ROWS + i) * 2 * H, pull, H);
      const int64_t partner = marginal ? next[i] - first : i;
      if (partner >= 0 && partner < count) add_row(grad + (n.right[p] * ROWS + partner) * 2 * H + H, pull, H);
      else stray_row[p] = next[i], std::memcpy(stray_pull + p * H, pull, H * sizeof(float));
    }
  }
}

extern "C" {

int64_t mocme_mine_pad() { return PAD; }

// Fills trained, sides, next, exps, and adds to sums.
void mocme_mine_forward(const Networks* networks) {
  const Networks& n = *networks;
  const std::vector<int64_t> place = place_rows(n);
  Packed first(n.S, n.D, 2 * n.H), second(n.P, n.H, n.H);
  const int64_t blocks = (n.V + ROWS - 1) / ROWS, wide = 2 * n.H;
  Buffer<double> moments(n.threads * n.S * 2 * n.D, true), pairs(n.threads * 6 * n.P, true);
#pragma omp parallel num_threads(n.threads)
  {
    [[maybe_unused]] const Tiles tiles;
    Space space(n.H);
    Buffer<Element> rows(ROWS * n.D, true);
    Buffer<float> sides(ROWS * wide), sums(2 * n.D), statistic(ROWS);
    double *moment = moments.data + thread_number() * n.S * 2 * n.D, *pair = pairs.data + thread_number() * 6 * n.P;
    first.take(n.first, false);
    second.take(n.second, false);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < n.P; ++p) shift_rows(n, place, p);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n.S * blocks; ++item) {
      const int64_t s = item / blocks, begin = item % blocks * ROWS, count = std::min(ROWS, n.V - begin);
      std::memset(sums.data, 0, 2 * n.D * sizeof(float));
      (n.low ? standardise_block<Low> : standardise_block<float>)(rows.data, sums.data, n, s, begin, count);
      for (int64_t d = 0; d < 2 * n.D; ++d) moment[s * 2 * n.D + d] += sums.data[d];
      const int64_t row_bytes = n.width * (n.low ? sizeof(Low) : sizeof(float));
      const char* ahead = static_cast<const char*>(n.view) + (s * n.V + begin + count) * row_bytes;
      multiply(sides.data, rows.data, first.at(s), n.D, wide, ahead, ROWS * row_bytes);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = place[begin + i];
        if (at < n.T) std::memcpy(static_cast<void*>(n.trained + (s * n.T + at) * n.D), rows.data + i * n.D, n.D * sizeof(Element));
        for (int64_t h = 0; h < wide; h += W) store(n.sides + (s * n.V + at) * wide + h, load(sides.data + i * wide + h));
      }
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * ROWS, count = std::min(ROWS, n.V - begin);
      for (int64_t item = 0; item < 2 * n.P; ++item) {
        const int64_t p = item / 2, marginal = item % 2;
        first_layer(space.hidden.data, n, p, begin, count, marginal);
        second_layer(statistic.data, space.product.data, space.hidden.data, n, second, p, count);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t v = begin + i;
          const bool there = n.next[p * n.V + v] >= 0, trains = v < n.T;
          double value = statistic.data[i];
          if (marginal) {
            // In double where it may be large: exp of a diverging T must not overflow before anybody has seen it.
            const double clipped = std::min(std::max(value, -n.clip), n.clip);
            value = !there ? 0.0 : n.clip < 80 ? std::exp(static_cast<float>(clipped)) : std::exp(clipped);
            if (trains) n.exps[p * n.T + v] = value;
          }
          if (!there) continue;
          for (int half = 0; half < 2; ++half) {
            if (half ? n.halves && trains : !trains) continue;
            double* to = pair + 3 * half * n.P + p;
            if (marginal) to[2 * n.P] += value;
            else to[0] += 1, to[n.P] += value;
          }
        }
      }
    }
  }
  for (int64_t thread = 0; thread < n.threads; ++thread) {
    double *rows = n.sums + 6 * n.P, *columns = rows + n.S;
    for (int64_t at = 0; at < 6 * n.P; ++at) n.sums[at] += pairs.data[thread * 6 * n.P + at];
    for (int64_t s = 0; s < n.S; ++s)
      for (int64_t part = 0; part < 2; ++part)
        for (int64_t d = 0; d < n.width; ++d)
          columns[(part * n.S + s) * n.width + d] += moments.data[((thread * n.S + s) * 2 + part) * n.D + d];
    if (thread == 0)
      for (int64_t s = 0; s < n.S; ++s) rows[s] += std::count(n.present + s * n.V, n.present + (s + 1) * n.V, 1);
  }
}

// From sums over ranks and `own` ones, see Networks, to the own share of the loss, its (2, P) slopes on T and exp T', (3, P)
// information, log n and log E[exp T'], and whether a pair has two rows; moves the averages: of exp T' (P), of each column's mean
// and deviation (S, D), their number (1).
void mocme_mine_finish(const double* sums, const double* own, float* mean_exp, float* center, float* deviation, float* updates, float* loss,
                       float* slopes, float* estimates, uint8_t* valid, int64_t S, int64_t P, int64_t D, int64_t bounded, int32_t) {
  const double *rows = sums + 6 * P, *total = rows + S, *square = total + S * D;
  for (int64_t s = 0; s < S; ++s) {
    const float keep = rows[s] < 2 ? 1.0f : updates[0] > 0 ? 0.9f : 0.0f;
    const double n = std::max(rows[s], 1.0);
    for (int64_t at = s * D; at < (s + 1) * D; ++at) {
      const double mean = total[at] / n, variance = square[at] / n - mean * mean;
      center[at] = static_cast<float>(keep * center[at] + (1 - keep) * mean);
      // Not std::max: what is not finite must be seen.
      deviation[at] = static_cast<float>(keep * deviation[at] + (1 - keep) * std::sqrt(variance < 1e-12 ? 1e-12 : variance));
    }
  }
  updates[0] += 1;
  const auto at_least = [](double x, double least) { return x < least ? least : x; };
  double value = 0;
  for (int64_t p = 0; p < P; ++p) {
    const double trained = sums[p], count = sums[3 * P + p], n = at_least(count, 1);
    const double log_mean_exp = std::log(at_least(sums[5 * P + p] / n, 1e-30));
    double information = at_least(sums[4 * P + p] / n - log_mean_exp, 0);
    if (bounded && information > std::log(n)) information = std::log(n);
    if (trained > 0) {
      const double fresh = sums[2 * P + p] / trained;
      mean_exp[p] = static_cast<float>(mean_exp[p] == 0 ? fresh : 0.9 * mean_exp[p] + 0.1 * fresh);
    }
    estimates[p] = static_cast<float>(information), estimates[P + p] = static_cast<float>(std::log(n));
    estimates[2 * P + p] = static_cast<float>(log_mean_exp);
    valid[p] = count >= 2;
    const double weight = 1 / at_least(trained, 1), slope = weight / at_least(mean_exp[p], 1e-30);
    slopes[p] = static_cast<float>(-weight), slopes[P + p] = static_cast<float>(slope);
    value += own[2 * P + p] * slope - own[P + p] * weight;
  }
  *loss = static_cast<float>(value);
}

// Fills first_grad and adds to the other gradients, from what forward left and the slopes.
void mocme_mine_backward(const Networks* networks) {
  const Networks& n = *networks;
  Packed second(n.P, n.H, n.H), transposed(n.P, n.H, n.H);
  const int64_t blocks = (n.T + ROWS - 1) / ROWS, wide = 2 * n.H;
  constexpr int64_t STRIP = 2 * PAD;  // columns of a view whose gradients fit the first cache
  const int64_t strips = (n.D + STRIP - 1) / STRIP;
  Strays strays(blocks, n);
  std::vector<std::unique_ptr<Sums>> found(n.threads);
  Buffer<Element> sides(n.S * blocks * ROWS * wide);
#pragma omp parallel num_threads(n.threads)
  {
    [[maybe_unused]] const Tiles tiles;
    Space space(n.H);
    found[thread_number()] = std::make_unique<Sums>(n);
    Buffer<float> grad(n.S * ROWS * wide);
    Buffer<Element> padded(ROWS * n.D);
    second.take(n.second, false);
    transposed.take(n.second, true);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * ROWS, count = std::min(ROWS, n.T - begin);
      pull_sides(grad.data, strays.row.data + block * n.P, strays.pull.data + block * n.P * n.H, space, *found[thread_number()], n, second, transposed, begin, count);
      for (int64_t s = 0; s < n.S; ++s) pack(sides.data + (s * blocks + block) * ROWS * wide, grad.data + s * ROWS * wide, ROWS, wide, wide, 1);
    }
#pragma omp for schedule(static)
    for (int64_t s = 0; s < n.S; ++s)
      for (int64_t at = 0; at < blocks * n.P; ++at) {
        const int64_t row = strays.row.data[at];
        if (row < 0 || n.right[at % n.P] != s) continue;
        Element* to = sides.data + (s * blocks + row / ROWS) * ROWS * wide;
        for (int64_t h = 0; h < n.H; ++h)
          add_packed(to, row % ROWS, n.H + h, ROWS, strays.pull.data[at * n.H + h]);
      }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < n.S * strips; ++item) {
      const int64_t s = item / strips, d = item % strips * STRIP, columns = std::min(STRIP, n.D - d);
      float* grad = n.first_grad + (s * n.D + d) * wide;
      std::memset(grad, 0, columns * wide * sizeof(float));
      for (int64_t block = 0, together = 1; block < blocks; block += together) {
        const Element* rows = n.trained + (s * n.T + block * ROWS) * n.D;
        together = std::min(BLOCKS, n.T / ROWS - block);
        if (together < 1) {  // the last rows are less than a block
          std::memset(static_cast<void*>(padded.data), 0, ROWS * n.D * sizeof(Element));
          std::memcpy(static_cast<void*>(padded.data), rows, (n.T - block * ROWS) * n.D * sizeof(Element));
          rows = padded.data, together = 1;
        }
        accumulate(grad, rows + d, n.D, columns, sides.data + (s * blocks + block) * ROWS * wide, wide, together);
      }
    }
  }
  for (const auto& sums : found) {
    if (!sums) continue;
    for (int64_t at = 0; at < n.P * n.H * n.H; ++at) n.second_grad[at] += sums->second.data[at];
    for (int64_t at = 0; at < n.P * n.H; ++at) {
      n.bias_grad[at] += sums->bias.data[at], n.second_bias_grad[at] += sums->second_bias.data[at];
      n.last_grad[at] += sums->last.data[at];
    }
  }
}

}  // extern "C"
