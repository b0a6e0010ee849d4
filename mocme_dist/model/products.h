// Products of a block of ROWS rows with a small square matrix, both in the first caches: in bfloat16 by AMX where the
// flags allow it, with float32 sums, in float32 by vectors elsewhere. Sizes are multiples of PAD.
#pragma once

#include <cstring>

#include "vector.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace mocme {

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// relu of NaN is NaN: what diverged must be seen.
#if defined(__AVX512F__)
inline Vec relu(Vec a) { return _mm512_max_ps(zero(), a); }
inline Vec where_positive(Vec sign, Vec value) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(sign, zero(), _CMP_GT_OQ), value); }
inline float total(Vec a) { return _mm512_reduce_add_ps(a); }
#elif defined(__AVX2__)
inline Vec relu(Vec a) { return _mm256_max_ps(zero(), a); }
inline Vec where_positive(Vec sign, Vec value) { return _mm256_and_ps(_mm256_cmp_ps(sign, zero(), _CMP_GT_OQ), value); }
inline float total(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#else
inline Vec relu(Vec a) { return each([&](int i) { return a.lane[i] < 0 ? 0.0f : a.lane[i]; }); }
inline Vec where_positive(Vec sign, Vec value) { return each([&](int i) { return sign.lane[i] > 0 ? value.lane[i] : 0.0f; }); }
inline float total(Vec a) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += a.lane[i];
  return sum;
}
#endif

constexpr int64_t ROWS = 32;

#if defined(__AMX_BF16__)

using Element = Low;
constexpr int64_t PAD = 32;

inline Vec load(const Element* p) { return load_low(p); }
inline void store(Element* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a))); }
inline float as_float(Element x) { return low_float(x); }
// Rounds to nearest, ties to even, as the vector form; NaN stays one.
inline Element as_element(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  return {static_cast<uint16_t>(rounded >> 16)};
}

// GCC's tile loads do not say that they read memory: what was written must be there before them.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// Tile registers of this thread, set up for 16 rows of 64 bytes, while this lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    settle();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// A (K, N) matrix with given strides as tiles of 32 x 16, rows two by two side by side, as the product reads them.
inline void pack(Element* to, const float* from, int64_t K, int64_t N, int64_t row, int64_t column) {
  for (int64_t n = 0; n < N; n += 16)
    for (int64_t k = 0; k < K; k += 2)
      if (column == 1) {
        const __m512bh pair = _mm512_cvtne2ps_pbh(load(from + (k + 1) * row + n), load(from + k * row + n));
        const __m512i even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(reinterpret_cast<__m512i>(pair)));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(reinterpret_cast<__m512i>(pair), 1));
        _mm512_storeu_si512(to + n * K + k * 16, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      } else {
        for (int64_t j = 0; j < 32; ++j) to[n * K + k * 16 + j] = as_element(from[(k + j % 2) * row + (n + j / 2) * column]);
      }
}

// out (ROWS, N) = rows (ROWS, K) * matrix, packed
inline void multiply(float* out, const Element* rows, const Element* matrix, int64_t K, int64_t N) {
  settle();
  for (int64_t n = 0; n < N; n += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < K; k += 32) {
      _tile_loadd(4, rows + k, K * 2);
      _tile_loadd(5, rows + 16 * K + k, K * 2);
      _tile_loadd(6, matrix + n * K + k * 16, 64);
      _tile_loadd(7, matrix + (n + 16) * K + k * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out + n, N * 4);
    _tile_stored(1, out + n + 16, N * 4);
    _tile_stored(2, out + 16 * N + n, N * 4);
    _tile_stored(3, out + 16 * N + n + 16, N * 4);
  }
  settle();
}

// Where `pack` puts element (k, n) of a matrix of K rows.
inline int64_t packed_place(int64_t k, int64_t n, int64_t K) { return n / 16 * 16 * K + k / 2 * 32 + n % 16 * 2 + k % 2; }

inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// out (M, N) += left^T right; left (ROWS, M) with a given stride, right (ROWS, N) packed
inline void accumulate(float* out, const Element* left, int64_t stride, int64_t M, const Element* right, int64_t N) {
  alignas(64) Element turned[2][16 * 32];
  for (int64_t i = 0; i < M; i += 32) {
    for (int half = 0; half < 2; ++half) {
      __m512i pairs[16];  // rows two by two side by side
      for (int r = 0; r < 16; ++r) {
        const Element* from = left + 2 * r * stride + i + 16 * half;
        const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + stride));
        pairs[r] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      }
      transpose(pairs);
      for (int r = 0; r < 16; ++r) _mm512_store_si512(turned[half] + 32 * r, pairs[r]);
    }
    settle();
    _tile_loadd(4, turned[0], 64);
    _tile_loadd(5, turned[1], 64);
    for (int64_t j = 0; j < N; j += 32) {
      float* to = out + i * N + j;
      _tile_loadd(6, right + j * ROWS, 64);
      _tile_loadd(7, right + (j + 16) * ROWS, 64);
      _tile_loadd(0, to, N * 4);
      _tile_loadd(1, to + 16, N * 4);
      _tile_loadd(2, to + 16 * N, N * 4);
      _tile_loadd(3, to + 16 * N + 16, N * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      _tile_stored(0, to, N * 4);
      _tile_stored(1, to + 16, N * 4);
      _tile_stored(2, to + 16 * N, N * 4);
      _tile_stored(3, to + 16 * N + 16, N * 4);
    }
  }
  settle();
}

#else

using Element = float;
constexpr int64_t PAD = 2 * LANES;
// Rows at once: with two vectors a row their sums fill the registers.
#if defined(__AVX512F__)
constexpr int64_t GROUP = 8;
#else
constexpr int64_t GROUP = 4;
#endif

inline Element as_element(float x) { return x; }
inline float as_float(Element x) { return x; }
struct Tiles {};
// A (K, N) matrix with given strides as strips of two vectors.
inline void pack(Element* to, const float* from, int64_t K, int64_t N, int64_t row, int64_t column) {
  for (int64_t n = 0; n < N; n += PAD)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < PAD; ++j) to[n * K + k * PAD + j] = from[k * row + (n + j) * column];
}

inline int64_t packed_place(int64_t k, int64_t n, int64_t K) { return n / PAD * PAD * K + k * PAD + n % PAD; }

// sum (GROUP, PAD) += left (GROUP, K), with given strides, * right (K, PAD)
inline void group_product(Vec (&sum)[GROUP][2], const float* left, int64_t row, int64_t step, const float* right, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    const Vec low = load(right + k * PAD), high = load(right + k * PAD + LANES);
    for (int64_t r = 0; r < GROUP; ++r) {
      const Vec x = fill(left[r * row + k * step]);
      sum[r][0] = fma(x, low, sum[r][0]), sum[r][1] = fma(x, high, sum[r][1]);
    }
  }
}

// out (ROWS, N) = rows (ROWS, K) * matrix, packed
inline void multiply(float* out, const Element* rows, const Element* matrix, int64_t K, int64_t N) {
  for (int64_t n = 0; n < N; n += PAD)
    for (int64_t i = 0; i < ROWS; i += GROUP) {
      Vec sum[GROUP][2];
      for (int64_t r = 0; r < GROUP; ++r) sum[r][0] = sum[r][1] = zero();
      group_product(sum, rows + i * K, K, 1, matrix + n * K, K);
      for (int64_t r = 0; r < GROUP; ++r) store(out + (i + r) * N + n, sum[r][0]), store(out + (i + r) * N + n + LANES, sum[r][1]);
    }
}

// out (M, N) += left^T right; left (ROWS, M) with a given stride, right (ROWS, N) packed
inline void accumulate(float* out, const Element* left, int64_t stride, int64_t M, const Element* right, int64_t N) {
  for (int64_t n = 0; n < N; n += PAD)
    for (int64_t i = 0; i < M; i += GROUP) {
      Vec sum[GROUP][2];
      for (int64_t r = 0; r < GROUP; ++r) sum[r][0] = load(out + (i + r) * N + n), sum[r][1] = load(out + (i + r) * N + n + LANES);
      group_product(sum, left + i, 1, stride, right + n * ROWS, ROWS);
      for (int64_t r = 0; r < GROUP; ++r) store(out + (i + r) * N + n, sum[r][0]), store(out + (i + r) * N + n + LANES, sum[r][1]);
    }
}

#endif

}  // namespace mocme
