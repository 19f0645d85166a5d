#pragma once

#include <cmath>

#include "fastdiff/philox.h"

namespace fastdiff {

// 1 + exp(-z), within 4 float32 ulps (with fused multiply-adds), infinite for z < -88.72. No libm
// and no branch, so that loops around it vectorize.
FASTDIFF_HD float one_plus_exp_minus(float z) {
  // z is brought into [-128 ln(2), 87] as integers: compilers make a branch of two comparisons of
  // floats. NaN goes to one of the ends. At -128 ln(2) r is 0, and what comes out is infinity.
  uint32_t bits = float_to_bits(z);
  bits = bits < 0xC2B17218u ? bits : 0xC2B17218u;
  int32_t bounded = static_cast<int32_t>(bits);
  bounded = bounded < 0x42AE0000 ? bounded : 0x42AE0000;
  const float a = bits_to_float(static_cast<uint32_t>(bounded));
  // exp(-a) = 2^n exp(r) with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer, whose bits
  // are then the low ones of the sum.
  const float shifted = 12582912.0f - a * 1.44269504f;
  const float n = shifted - 12582912.0f;
  const float r = -a - n * 0.693147182f;  // the constant is within 2e-9 of ln(2)
  float p = 0.00831250381f;
  p = p * r + 0.0418903343f;
  p = p * r + 0.166671157f;
  p = p * r + 0.499992311f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return 1.0f + bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}
FASTDIFF_HD double one_plus_exp_minus(double z) { return 1.0 + exp(-z); }

// z sigmoid(z)
template <typename T>
FASTDIFF_HD T silu(T z) {
  return z / one_plus_exp_minus(z);
}

// Its derivative.
template <typename T>
FASTDIFF_HD T silu_slope(T z) {
  const T s = T(1) / one_plus_exp_minus(z);
  return s + z * (s * (T(1) - s));
}

}  // namespace fastdiff
