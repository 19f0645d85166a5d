#include "dropout.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "philox_words.h"
#include "simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastdiff::cpu {
namespace {

// Bit i: whether byte i of 16 words is `threshold` or more.
uint64_t kept_bytes(const uint32_t words[kPhiloxLanes], int32_t threshold) {
  static_assert(kPhiloxLanes == 16);
  uint64_t bits = 0;
#if defined(__SSE2__)
  const __m128i least = _mm_set1_epi8(static_cast<char>(threshold));
  for (int part = 0; part < 4; ++part) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 4 * part));
    const __m128i kept = _mm_cmpeq_epi8(_mm_max_epu8(bytes, least), bytes);
    bits |= static_cast<uint64_t>(_mm_movemask_epi8(kept)) << (16 * part);
  }
#else
  for (int i = 0; i < 64; ++i) {
    const int32_t byte = static_cast<int32_t>(words[i / 4] >> (8 * (i % 4)) & 255u);
    bits |= static_cast<uint64_t>(byte >= threshold) << i;
  }
#endif
  return bits;
}

// Bit 4 lane + pixel of word number `channel` becomes bit 4 lane + channel of word number `pixel`.
void exchange(uint64_t bits[4]) {
  constexpr uint64_t kFirst = 0x1111111111111111ull;
  uint64_t out[4]{};
  for (int pixel = 0; pixel < 4; ++pixel) {
    for (int channel = 0; channel < 4; ++channel) {
      out[pixel] |= (bits[channel] >> pixel & kFirst) << channel;
    }
  }
  std::copy(out, out + 4, bits);
}

// In which order the 16 elements of a run lie.
constexpr uint32_t kInOrder[16] = {1u << 0,  1u << 1,  1u << 2,  1u << 3, 1u << 4,  1u << 5,
                                   1u << 6,  1u << 7,  1u << 8,  1u << 9, 1u << 10, 1u << 11,
                                   1u << 12, 1u << 13, 1u << 14, 1u << 15};
constexpr uint32_t kEvensFirst[16] = {1u << 0,  1u << 2,  1u << 4,  1u << 6, 1u << 8, 1u << 10,
                                      1u << 12, 1u << 14, 1u << 1,  1u << 3, 1u << 5, 1u << 7,
                                      1u << 9,  1u << 11, 1u << 13, 1u << 15};

// Of `lines` lines from number `line` on, whose bits begin `width` bits after each other in each of
// four planes.
template <typename F>
FASTDIFF_HD void multipliers_loop(const char* planes, int64_t plane_bytes, int64_t width,
                                  int64_t line, int64_t lines, int64_t offset, int64_t n,
                                  const uint32_t* order, F scale, F* out) {
  for (int64_t end = line + lines; line < end; ++line, out += n) {
    const char* plane = planes + line % 4 * plane_bytes;
    int64_t i = 0, bit = line / 4 * width + offset;
    for (; i + 16 <= n; i += 16, bit += 16) {
      uint32_t bits;
      std::memcpy(&bits, plane + bit / 8, sizeof bits);
      bits >>= bit % 8;
#pragma omp simd
      for (int l = 0; l < 16; ++l) out[i + l] = (bits & order[l]) ? scale : F(0);
    }
    for (; i < n; ++i, ++bit) out[i] = (plane[bit / 8] >> (bit % 8) & 1) ? scale : F(0);
  }
}

}  // namespace

// Philox blocks of four lines.
int64_t DropoutBits::line_blocks() const {
  return ((layout_.channels_last ? layout_.channels : layout_.pixels) + 3) / 4;
}

void DropoutBits::make(int64_t sample, int64_t first, int64_t lines, bool shared) {
  first_ = first / 4 * 4;
  const int64_t blocks = (first + lines - first_ + 3) / 4 * line_blocks();
  const int64_t words = (blocks + kPhiloxLanes - 1) / kPhiloxLanes;
  plane_ = words + 1;  // what is read of a plane may end behind its bits
  bits_.resize(4 * plane_);
  const uint64_t key = dropout_.source.key(sample);
  if (!shared) return fill(key, first_ / 4, 0, words);
  parallel_for(0, words, 64,
               [&](int64_t begin, int64_t end) { fill(key, first_ / 4, begin, end); });
}

// The words [begin, end) of every plane. `first_block`: of lines, counted in fours.
void DropoutBits::fill(uint64_t key, int64_t first_block, int64_t begin, int64_t end) {
  const int64_t width = line_blocks();
  const int64_t pixel_blocks = (layout_.pixels + 3) / 4;
  // The block of lines and the one along them that lane 0 has. In memory lines come after each
  // other; Philox counts along the pixels in both formats.
  int64_t line = first_block + begin * kPhiloxLanes / width, along = begin * kPhiloxLanes % width;
  for (int64_t word = begin; word < end; ++word) {
    uint64_t blocks[kPhiloxLanes];
    if (!layout_.channels_last) {
      const uint64_t first = static_cast<uint64_t>(first_block * width + word * kPhiloxLanes);
      for (int lane = 0; lane < kPhiloxLanes; ++lane) blocks[lane] = first + lane;
    } else {
      for (int lane = 0; lane < kPhiloxLanes; ++lane) {
        blocks[lane] = static_cast<uint64_t>(along * pixel_blocks + line);
        if (++along == width) along = 0, ++line;
      }
    }
    PhiloxWords made;
    philox_words(key, dropout_.source.stream, blocks, made);
    uint64_t bits[4];
    for (int k = 0; k < 4; ++k) bits[k] = kept_bytes(made.w[k], dropout_.threshold);
    if (layout_.channels_last) exchange(bits);
    for (int k = 0; k < 4; ++k) bits_[k * plane_ + word] = bits[k];
  }
}

template <typename F>
void DropoutBits::multipliers(int64_t line, int64_t lines, int64_t offset, int64_t n,
                              bool evens_first, F* out) const {
  const F scale = F(256) / static_cast<F>(256 - dropout_.threshold);
  float_clones<F, multipliers_loop<F>>(reinterpret_cast<const char*>(bits_.data()), 8 * plane_,
                                       4 * line_blocks(), line - first_, lines, offset, n,
                                       evens_first ? kEvensFirst : kInOrder, scale, out);
}

template void DropoutBits::multipliers(int64_t, int64_t, int64_t, int64_t, bool, float*) const;
template void DropoutBits::multipliers(int64_t, int64_t, int64_t, int64_t, bool, double*) const;

}  // namespace fastdiff::cpu
