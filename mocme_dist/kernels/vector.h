// A vector of floats in the widest form that the flags allow.
//
// Every lane is computed by the same operations whatever its neighbours are, so equal inputs give equal bits wherever
// they stand. The formulas that use vectors are in distance.h; here are the operations, once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mocme {

using Half = uint16_t;  // the bits of an IEEE half-precision number

#if defined(__AVX512F__)

constexpr int LANES = 16;
using Vec = __m512;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec fill(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline float sum_lanes(Vec a) { return _mm512_reduce_add_ps(a); }
// Bits of the lanes where not a >= b (NaN included), where a == b, and where a > b.
inline uint32_t not_at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGE_UQ); }
inline uint32_t equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline uint32_t above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

// sum + sqrt(s) / ROOT_SCALE. The square root unit takes 19 cycles for 16 numbers; a reciprocal estimate of 14 bits
// with one Newton step is right to the last digit or two and takes 5: s r (3 - s r^2) with r about 1 / sqrt(s). The
// halving that Newton's step asks for is left to the end of a sum.
constexpr float ROOT_SCALE = 0.5f;
inline Vec add_root(Vec sum, Vec s) {
    const Vec r = _mm512_rsqrt14_ps(s);
    const Vec y = mul(s, r);
    return fma(y, _mm512_fnmadd_ps(y, r, fill(3.0f)), sum);
}
// 1 / sqrt(s) / INVERSE_SCALE, the same way.
constexpr float INVERSE_SCALE = 0.5f;
inline Vec inverse_root(Vec s) {
    const Vec r = _mm512_rsqrt14_ps(s);
    return mul(r, _mm512_fnmadd_ps(mul(s, r), r, fill(3.0f)));
}

#elif defined(__AVX2__)

constexpr int LANES = 8;
using Vec = __m256;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec fill(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline float sum_lanes(Vec a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline uint32_t bits(__m256 mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
inline uint32_t not_at_least(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_NGE_UQ)); }
inline uint32_t equal(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
inline uint32_t above(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }

// The reciprocal estimate has 12 bits here, too few for one Newton step, and the square root of 8 numbers takes 6
// cycles.
constexpr float ROOT_SCALE = 1.0f;
inline Vec add_root(Vec sum, Vec s) { return add(sum, _mm256_sqrt_ps(s)); }
// For gradients the 22 bits that one Newton step gives are enough.
constexpr float INVERSE_SCALE = 0.5f;
inline Vec inverse_root(Vec s) {
    const Vec r = _mm256_rsqrt_ps(s);
    return mul(r, _mm256_fnmadd_ps(mul(s, r), r, fill(3.0f)));
}

#else

// Loops of a fixed length, which compilers turn into whatever vectors there are.
constexpr int LANES = 8;
struct Vec {
    float lane[LANES];
};
template <typename F>
inline Vec each(F f) {
    Vec out;
    for (int i = 0; i < LANES; ++i) out.lane[i] = f(i);
    return out;
}
template <typename F>
inline uint32_t bits(F f) {
    uint32_t out = 0;
    for (int i = 0; i < LANES; ++i) out |= static_cast<uint32_t>(f(i)) << i;
    return out;
}
// The float of half-precision bits. Shifted into place, exponent and mantissa are those of a float whose exponent is
// 112 too small, subnormal numbers included; infinity and NaN keep the largest exponent.
inline float widen(Half half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = static_cast<uint32_t>(half & 0x7fff)
                                                                                  << 13;
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    uint32_t result;
    std::memcpy(&result, &value, sizeof result);
    result |= sign | ((half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
    std::memcpy(&value, &result, sizeof value);
    return value;
}
inline Vec zero() {
    return each([](int) { return 0.0f; });
}
inline Vec load(const float* p) {
    return each([=](int i) { return p[i]; });
}
inline Vec load(const Half* p) {
    return each([=](int i) { return widen(p[i]); });
}
inline Vec fill(float x) {
    return each([=](int) { return x; });
}
inline Vec add(Vec a, Vec b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(Vec a, Vec b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) { return add(mul(a, b), c); }
inline void store(float* p, Vec a) {
    for (int i = 0; i < LANES; ++i) p[i] = a.lane[i];
}
inline float sum_lanes(Vec a) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; ++i) sum += a.lane[i];
    return sum;
}
inline uint32_t not_at_least(Vec a, Vec b) {
    return bits([&](int i) { return !(a.lane[i] >= b.lane[i]); });
}
inline uint32_t equal(Vec a, Vec b) {
    return bits([&](int i) { return a.lane[i] == b.lane[i]; });
}
inline uint32_t above(Vec a, Vec b) {
    return bits([&](int i) { return a.lane[i] > b.lane[i]; });
}

constexpr float ROOT_SCALE = 1.0f;
inline Vec add_root(Vec sum, Vec s) {
    return each([&](int i) { return sum.lane[i] + std::sqrt(s.lane[i]); });
}
constexpr float INVERSE_SCALE = 1.0f;
inline Vec inverse_root(Vec s) {
    return each([&](int i) { return 1.0f / std::sqrt(s.lane[i]); });
}

#endif

}  // namespace mocme
