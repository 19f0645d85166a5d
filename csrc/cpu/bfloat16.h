#pragma once

#include "fastdiff/philox.h"

namespace fastdiff::cpu {

// The float whose upper 16 bits are `value` rounded to the nearest even bfloat16; NaN stays NaN. The
// lower bits are of no meaning.
FASTDIFF_HD uint32_t round_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return value == value ? rounded : bits | 0x400000u;
}

}  // namespace fastdiff::cpu
