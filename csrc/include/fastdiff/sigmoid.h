#pragma once

#include <cmath>

#include "fastdiff/philox.h"

namespace fastdiff {

// 1 / (1 + exp(-z)) within 2 float32 ulps for z >= -88, where it is 4e-39, and 0 below. No libm and no
// branch in float32, so that loops around it vectorize.
FASTDIFF_HD float sigmoid(float z) {
  // exp(-z) = 2^n exp(r) with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer, whose bits
  // are then the low ones of the sum.
  float a = -z;
  a = a > -87.0f ? a : -87.0f;
  a = a < 88.0f ? a : 88.0f;
  const float shifted = a * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  float r = a - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 0.00138145383f;
  p = p * r + 0.00836874545f;
  p = p * r + 0.0416683890f;
  p = p * r + 0.166665211f;
  p = p * r + 0.499999940f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float e = bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
  const float s = 1.0f / (1.0f + e);
  return z < -88.0f ? 0.0f : s;
}

FASTDIFF_HD double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }

// z sigmoid(z) and its derivative.
template <typename T>
FASTDIFF_HD T silu(T z) {
  return z * sigmoid(z);
}

template <typename T>
FASTDIFF_HD T silu_slope(T z) {
  const T s = sigmoid(z);
  return s * (T(1) + z * (T(1) - s));
}

}  // namespace fastdiff
