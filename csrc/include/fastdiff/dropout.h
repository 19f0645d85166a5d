#pragma once

// Dropout's mask as a pure function of (key, stream, channel, pixel): docs/mathematics.md §9.

#include "fastdiff/philox.h"

namespace fastdiff {

// A Philox block of 16 bytes decides for 4 channels at 4 pixels (counted in logical order), so that
// neighbours in either memory format share blocks: word c mod 4 belongs to channel c, its byte
// p mod 4 (from the low end) to pixel p. The element is dropped if the byte is below `threshold`.
struct Dropout {
  NoiseSource source;
  int32_t threshold;  // 256 times the probability, 1 to 255; 0: no dropout

  static constexpr int kSide = 4;

  // What elements that are kept are multiplied with.
  FASTDIFF_HD float scale() const { return 256.0f / static_cast<float>(256 - threshold); }

  // The block of channel c and pixel p of a sample of `pixels` pixels.
  static FASTDIFF_HD uint64_t block(int64_t c, int64_t p, int64_t pixels) {
    return static_cast<uint64_t>(c / kSide * ((pixels + kSide - 1) / kSide) + p / kSide);
  }
};

}  // namespace fastdiff
