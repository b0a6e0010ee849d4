// The RotatE distance in C++: a sum of moduli of complex numbers, and the derivative of a modulus.
//
// distance.py has the definition in torch, distance_triton.py the one in Triton. Sums of moduli are monotone: adding a
// modulus never makes a sum smaller, in floating point too.
#pragma once

#include "vector.h"

namespace mocme {

// Added to squares: keeps 1 / sqrt finite and leaves every digit of what is above 1e-17.
constexpr float TINY = 1e-24f;

inline Vec squared_modulus(Vec re, Vec im) { return fma(re, re, fma(im, im, fill(TINY))); }

// sum + |re + i im| / MODULUS_SCALE
constexpr float MODULUS_SCALE = ROOT_SCALE;
inline Vec add_modulus(Vec sum, Vec re, Vec im) { return add_root(sum, squared_modulus(re, im)); }

// 1 / |re + i im| / INVERSE_SCALE, 1e12 / INVERSE_SCALE where both are 0. The derivative of the modulus by re is re
// times it.
inline Vec inverse_modulus(Vec re, Vec im) { return inverse_root(squared_modulus(re, im)); }

}  // namespace mocme
