// Products of a block of ROWS rows with a small square matrix, both in the first caches: in bfloat16 by AMX where the
// flags allow it, with float32 sums, in float32 by vectors elsewhere. Sizes are multiples of PAD.
#pragma once

#include <cstdlib>
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

constexpr int64_t ROWS = 32, BLOCKS = 4;

#if defined(__AMX_BF16__)

// Numbers of a product are bfloat16, or with SPLIT the sum of two, which holds 16 bits: x y is then the sum of three
// products, as in torch's float32_matmul_precision "high". In memory 32 numbers are 32 first parts and, beside them, their
// 32 second parts; matrices begin at multiples of ALIGN bytes.
#if defined(MOCME_SPLIT)
constexpr int64_t PARTS = 2;
#else
constexpr int64_t PARTS = 1;
#endif
constexpr int64_t PAD = 32, ALIGN = 64 * PARTS;
struct Element {
  Low part[PARTS];
};

// First part of the number at p; the second is 32 numbers behind it.
inline Low* parts(Element* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  return reinterpret_cast<Low*>(PARTS == 2 ? at - (at & 64) / 2 : at);
}
inline const Low* parts(const Element* p) { return parts(const_cast<Element*>(p)); }

inline Vec load(const Element* p) {
  const Low* from = parts(p);
  return PARTS == 2 ? add(load_low(from), load_low(from + 32)) : load_low(from);
}
inline __m256i round_low(Vec a) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)); }
inline void store(Element* p, Vec a) {
  const __m256i first = round_low(a);
  __m256i* to = reinterpret_cast<__m256i*>(parts(p));
  _mm256_storeu_si256(to, first);
  if (PARTS == 2) _mm256_storeu_si256(to + 2, round_low(sub(a, widen(first))));
}
// Rounds to nearest, ties to even, as the vector form; NaN stays one.
inline Low as_low(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  return {static_cast<uint16_t>(rounded >> 16)};
}
inline void put(Low* first, int64_t to_second, float x) {
  *first = as_low(x);
  if (PARTS == 2) first[to_second] = as_low(x - low_float(*first));
}
// Number d of a row.
inline void put(Element* row, int64_t d, float x) { put(reinterpret_cast<Low*>(row) + d / 32 * 32 * PARTS + d % 32, 32, x); }
// Number (k, n) of a packed matrix of K rows.
inline void add_packed(Element* matrix, int64_t k, int64_t n, int64_t K, float x) {
  Low* at = reinterpret_cast<Low*>(matrix) + (n / 16 * 16 * K + k / 32 * 512) * PARTS + k % 32 / 2 * 32 + n % 16 * 2 + k % 2;
  put(at, 512, low_float(*at) + (PARTS == 2 ? low_float(at[512]) : 0.0f) + x);
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

// Two rows of 16 numbers side by side, pair by pair.
inline __m512i pair_up(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// A (K, N) matrix with given strides as tiles of 32 x 16, rows two by two side by side, as the product reads them.
inline void pack(Element* to, const float* from, int64_t K, int64_t N, int64_t row, int64_t column) {
  for (int64_t n = 0; n < N; n += 16)
    for (int64_t k = 0; k < K; k += 2) {
      Low* tile = reinterpret_cast<Low*>(to) + (n * K + k / 32 * 512) * PARTS + k % 32 * 16;
      if (column == 1) {
        const Vec even = load(from + k * row + n), odd = load(from + (k + 1) * row + n);
        const __m256i even_first = round_low(even), odd_first = round_low(odd);
        _mm512_storeu_si512(tile, pair_up(even_first, odd_first));
        if (PARTS == 2) {
          const __m256i even_rest = round_low(sub(even, widen(even_first))), odd_rest = round_low(sub(odd, widen(odd_first)));
          _mm512_storeu_si512(tile + 512, pair_up(even_rest, odd_rest));
        }
      } else {
        for (int64_t j = 0; j < 32; ++j) put(tile + j, 512, from[(k + j % 2) * row + (n + j / 2) * column]);
      }
    }
}

// Tiles 0 to 3 += tiles 4 and 5 times 6 and 7.
inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Tiles 0 to 3 += the products of two left tiles, `stride` bytes a row, and two right ones; second parts `next` numbers on.
inline void multiply_tiles(const Low* above, const Low* below, int64_t stride, int64_t next, const Low* left, const Low* right) {
  if (PARTS == 2) {  // what is smaller first; of the second parts' own product nothing would be left
    _tile_loadd(4, above + next, stride);
    _tile_loadd(5, below + next, stride);
  } else {
    _tile_loadd(4, above, stride);
    _tile_loadd(5, below, stride);
  }
  _tile_loadd(6, left, 64);
  _tile_loadd(7, right, 64);
  multiply_tiles();
  if (PARTS == 2) {
    _tile_loadd(4, above, stride);
    _tile_loadd(5, below, stride);
    multiply_tiles();
    _tile_loadd(6, left + 512, 64);
    _tile_loadd(7, right + 512, 64);
    multiply_tiles();
  }
}

// out (ROWS, N) = rows (ROWS, K) * matrix, packed. Meanwhile `bytes` from `ahead` on, which come next, are brought nearer.
inline void multiply(float* out, const Element* rows, const Element* matrix, int64_t K, int64_t N, const void* ahead = nullptr, int64_t bytes = 0) {
  const int64_t share = bytes * 32 * 32 / (K * N);
  const char* next = static_cast<const char*>(ahead);
  settle();
  for (int64_t n = 0; n < N; n += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < K; k += 32) {
      for (const char* end = next + share; next < end; next += 64) _mm_prefetch(next, _MM_HINT_T1);
      const Low* left = reinterpret_cast<const Low*>(matrix + n * K + k * 16);
      multiply_tiles(parts(rows + k), parts(rows + 16 * K + k), K * 2 * PARTS, 32, left, left + 16 * K * PARTS);
    }
    _tile_stored(0, out + n, N * 4);
    _tile_stored(1, out + n + 16, N * 4);
    _tile_stored(2, out + 16 * N + n, N * 4);
    _tile_stored(3, out + 16 * N + n + 16, N * 4);
  }
  settle();
}

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

// out (M, N) += left^T right; left (blocks * ROWS, M) with a given stride, right packed block by block, (ROWS, N) each.
// Several blocks at once, at most BLOCKS: `out` comes into the registers and leaves them once for all of them.
inline void accumulate(float* out, const Element* left, int64_t stride, int64_t M, const Element* right, int64_t N, int64_t blocks = 1) {
  constexpr int64_t TILE = 16 * 32;
  alignas(64) Low turned[BLOCKS][2 * PARTS * TILE];
  for (int64_t i = 0; i < M; i += 32) {
    for (int64_t b = 0; b < blocks; ++b)
      for (int half = 0; half < 2; ++half)
        for (int64_t part = 0; part < PARTS; ++part) {
          __m512i pairs[16];  // rows two by two side by side
          for (int r = 0; r < 16; ++r) {
            const auto row = [=](int64_t number) {
              const Low* from = parts(left + (b * ROWS + number) * stride + i + 16 * half) + 32 * part;
              return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            };
            pairs[r] = pair_up(row(2 * r), row(2 * r + 1));
          }
          transpose(pairs);
          for (int r = 0; r < 16; ++r) _mm512_store_si512(turned[b] + (half * PARTS + part) * TILE + 32 * r, pairs[r]);
        }
    settle();
    for (int64_t j = 0; j < N; j += 32) {
      float* to = out + i * N + j;
      _tile_loadd(0, to, N * 4);
      _tile_loadd(1, to + 16, N * 4);
      _tile_loadd(2, to + 16 * N, N * 4);
      _tile_loadd(3, to + 16 * N + 16, N * 4);
      for (int64_t b = 0; b < blocks; ++b) {
        const Low* first = reinterpret_cast<const Low*>(right + b * ROWS * N + j * ROWS);
        multiply_tiles(turned[b], turned[b] + PARTS * TILE, 64, TILE, first, first + 16 * ROWS * PARTS);
      }
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

constexpr int64_t ALIGN = 64;

inline void put(Element* row, int64_t d, float x) { row[d] = x; }
struct Tiles {};
// A (K, N) matrix with given strides as strips of two vectors.
inline void pack(Element* to, const float* from, int64_t K, int64_t N, int64_t row, int64_t column) {
  for (int64_t n = 0; n < N; n += PAD)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < PAD; ++j) to[n * K + k * PAD + j] = from[k * row + (n + j) * column];
}

// Number (k, n) of a packed matrix of K rows.
inline void add_packed(Element* matrix, int64_t k, int64_t n, int64_t K, float x) { matrix[n / PAD * PAD * K + k * PAD + n % PAD] += x; }

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
inline void multiply(float* out, const Element* rows, const Element* matrix, int64_t K, int64_t N, const void* = nullptr, int64_t = 0) {
  for (int64_t n = 0; n < N; n += PAD)
    for (int64_t i = 0; i < ROWS; i += GROUP) {
      Vec sum[GROUP][2];
      for (int64_t r = 0; r < GROUP; ++r) sum[r][0] = sum[r][1] = zero();
      group_product(sum, rows + i * K, K, 1, matrix + n * K, K);
      for (int64_t r = 0; r < GROUP; ++r) store(out + (i + r) * N + n, sum[r][0]), store(out + (i + r) * N + n + LANES, sum[r][1]);
    }
}

// out (M, N) += left^T right; left (blocks * ROWS, M) with a given stride, right packed block by block, (ROWS, N) each
inline void accumulate(float* out, const Element* left, int64_t stride, int64_t M, const Element* right, int64_t N, int64_t blocks = 1) {
  for (int64_t n = 0; n < N; n += PAD)
    for (int64_t i = 0; i < M; i += GROUP) {
      Vec sum[GROUP][2];
      for (int64_t r = 0; r < GROUP; ++r) sum[r][0] = load(out + (i + r) * N + n), sum[r][1] = load(out + (i + r) * N + n + LANES);
      for (int64_t b = 0; b < blocks; ++b)
        group_product(sum, left + b * ROWS * stride + i, 1, stride, right + b * ROWS * N + n * ROWS, ROWS);
      for (int64_t r = 0; r < GROUP; ++r) store(out + (i + r) * N + n, sum[r][0]), store(out + (i + r) * N + n + LANES, sum[r][1]);
    }
}

#endif

// Memory of a kernel's own, where its matrices may begin.
template <typename T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count, bool zeros = false) : data(static_cast<T*>(std::aligned_alloc(ALIGN, count * sizeof(T) / ALIGN * ALIGN + ALIGN))) {
    if (zeros) std::memset(static_cast<void*>(data), 0, count * sizeof(T));
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

}  // namespace mocme
