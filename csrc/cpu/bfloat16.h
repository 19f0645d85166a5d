#pragma once

#include "fastdiff/philox.h"

namespace fastdiff::cpu {

// The float whose upper 16 bits are `value` rounded to the nearest even bfloat16; NaN stays NaN.
// The lower bits are of no meaning.
FASTDIFF_HD uint32_t round_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return value == value ? rounded : bits | 0x400000u;
}

// Two bfloat16 of one array, at any address.
typedef uint32_t Pair __attribute__((aligned(2), may_alias));

FASTDIFF_HD float low(uint32_t pair) { return bits_to_float(pair << 16); }
FASTDIFF_HD float high(uint32_t pair) { return bits_to_float(pair & 0xFFFF0000u); }

FASTDIFF_HD uint32_t bfloat16_pair(float low_value, float high_value) {
  return (round_to_bfloat16(low_value) >> 16) | (round_to_bfloat16(high_value) & 0xFFFF0000u);
}

}  // namespace fastdiff::cpu
