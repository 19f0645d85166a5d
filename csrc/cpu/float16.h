#pragma once

#include "fastdiff/philox.h"

namespace fastdiff::cpu {

// Scaling by 2^112 moves the exponent from half's bias to float's and normalizes subnormals.
FASTDIFF_HD float float16_to_float(uint32_t h) {
  const uint32_t magnitude = (h & 0x7FFFu) << 13;
  const float finite = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7F800000u;
  const uint32_t bits = magnitude >= 0x0F800000u ? special : float_to_bits(finite);
  return bits_to_float(bits | ((h & 0x8000u) << 16));
}

// Rounds to nearest even. Subnormal halves come from a float addition that aligns the mantissa.
FASTDIFF_HD uint16_t round_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? special : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

}  // namespace fastdiff::cpu
