// A vector of floats in the widest form that the flags allow, and the modulus of complex numbers.
//
// Every lane is computed by the same operations whatever its neighbours are, so equal inputs give equal bits wherever
// they stand. Sums of moduli are monotone: adding a modulus never makes a sum smaller, in floating point too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mocme {

// Added to squares: keeps 1 / sqrt finite and leaves every digit of what is above 1e-17.
constexpr float TINY = 1e-24f;

#if defined(__AVX512F__)

constexpr int LANES = 16;
using Vec = __m512;
// What add_modulus adds is twice the modulus: the halving is left to the end.
constexpr float MODULUS_SCALE = 0.5f;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec fill(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
// Bits of the lanes where not a >= b (NaN included), and where a == b.
inline uint32_t not_at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGE_UQ); }
inline uint32_t equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline uint32_t above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// sum + 2 sqrt(re^2 + im^2). The square root unit takes 19 cycles for 16 numbers; a reciprocal estimate of 14 bits with
// one Newton step is right to the last digit or two and takes 5: s r (3 - s r^2) with r about 1 / sqrt(s).
inline Vec add_modulus(Vec sum, Vec re, Vec im) {
    const Vec s = fma(re, re, fma(im, im, fill(TINY)));
    const Vec r = _mm512_rsqrt14_ps(s);
    const Vec y = mul(s, r);
    return fma(y, _mm512_fnmadd_ps(y, r, fill(3.0f)), sum);
}
// 2 / sqrt(re^2 + im^2), the same way; 2e12 where both are 0.
constexpr float INVERSE_SCALE = 0.5f;
inline Vec inverse_modulus(Vec re, Vec im) {
    const Vec s = fma(re, re, fma(im, im, fill(TINY)));
    const Vec r = _mm512_rsqrt14_ps(s);
    return mul(r, _mm512_fnmadd_ps(mul(s, r), r, fill(3.0f)));
}

#elif defined(__AVX2__)

constexpr int LANES = 8;
using Vec = __m256;
constexpr float MODULUS_SCALE = 1.0f;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec fill(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline uint32_t bits(__m256 mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
inline uint32_t not_at_least(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_NGE_UQ)); }
inline uint32_t equal(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
inline uint32_t above(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
// The reciprocal estimate has 12 bits here, too few for one Newton step, and the square root of 8 numbers takes 6 cycles.
inline Vec add_modulus(Vec sum, Vec re, Vec im) {
    return add(sum, _mm256_sqrt_ps(fma(re, re, fma(im, im, fill(TINY)))));
}
// 2 / sqrt(re^2 + im^2): for gradients the 22 bits that one Newton step gives are enough.
constexpr float INVERSE_SCALE = 0.5f;
inline Vec inverse_modulus(Vec re, Vec im) {
    const Vec s = fma(re, re, fma(im, im, fill(TINY)));
    const Vec r = _mm256_rsqrt_ps(s);
    return mul(r, _mm256_fnmadd_ps(mul(s, r), r, fill(3.0f)));
}

#else

// Loops of a fixed length that any compiler turns into whatever vectors there are.
constexpr int LANES = 8;
struct Vec {
    float lane[LANES];
};
constexpr float MODULUS_SCALE = 1.0f;
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
inline Vec zero() { return each([](int) { return 0.0f; }); }
inline Vec load(const float* p) { return each([=](int i) { return p[i]; }); }
inline Vec fill(float x) { return each([=](int) { return x; }); }
inline Vec add(Vec a, Vec b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Vec sub(Vec a, Vec b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline Vec mul(Vec a, Vec b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) { return add(mul(a, b), c); }
inline void store(float* p, Vec a) {
    for (int i = 0; i < LANES; ++i) p[i] = a.lane[i];
}
inline uint32_t not_at_least(Vec a, Vec b) { return bits([&](int i) { return !(a.lane[i] >= b.lane[i]); }); }
inline uint32_t equal(Vec a, Vec b) { return bits([&](int i) { return a.lane[i] == b.lane[i]; }); }
inline uint32_t above(Vec a, Vec b) { return bits([&](int i) { return a.lane[i] > b.lane[i]; }); }
inline Vec add_modulus(Vec sum, Vec re, Vec im) {
    const Vec s = fma(re, re, fma(im, im, fill(TINY)));
    return each([&](int i) { return sum.lane[i] + std::sqrt(s.lane[i]); });
}
constexpr float INVERSE_SCALE = 1.0f;
inline Vec inverse_modulus(Vec re, Vec im) {
    const Vec s = fma(re, re, fma(im, im, fill(TINY)));
    return each([&](int i) { return 1.0f / std::sqrt(s.lane[i]); });
}

#endif

// bfloat16, the upper half of a float32.
struct Low {
    uint16_t bits;
};
inline float low_float(Low x) {
    const uint32_t whole = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &whole, sizeof out);
    return out;
}
// LANES of them.
#if defined(__AVX512F__)
inline Vec widen(__m256i low) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16)); }
inline Vec load_low(const Low* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
#elif defined(__AVX2__)
inline Vec load_low(const Low* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
#else
inline Vec load_low(const Low* p) { return each([=](int i) { return low_float(p[i]); }); }
#endif

}  // namespace mocme
