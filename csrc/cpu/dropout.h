#pragma once

#include <algorithm>
#include <vector>

#include "fastdiff/group_norm_silu.h"

namespace fastdiff::cpu {

// Dropout's mask of a part of a sample, one bit for each element. "Lines" are channels with their
// pixels or, if channels_last, pixels with their channels: what is adjacent in memory.
class DropoutBits {
 public:
  DropoutBits(const Dropout& dropout, const GroupNormLayout& layout)
      : dropout_(dropout), layout_(layout) {}

  bool any() const { return dropout_.threshold > 0; }

  // Makes the bits of `lines` lines of a sample from line `first` on, on all threads if `shared`.
  void make(int64_t sample, int64_t first, int64_t lines, bool shared);

  // What the elements [offset, offset + n) of `lines` lines are multiplied with: 0 or the scale.
  // With `evens_first`, in each run of 16 elements those with even numbers come first: the order of
  // the lanes of BFloat16 in lanes.h.
  template <typename F>
  void multipliers(int64_t line, int64_t lines, int64_t offset, int64_t n, bool evens_first,
                   F* out) const;

 private:
  int64_t line_blocks() const;
  void fill(uint64_t key, int64_t first_block, int64_t begin, int64_t end);

  const Dropout& dropout_;
  const GroupNormLayout& layout_;
  int64_t first_ = 0;  // line, a multiple of 4
  // Four planes of this many words; element e of line l has bit 4 line_blocks() (l div 4) + e of
  // plane l mod 4.
  int64_t plane_ = 0;
  std::vector<uint64_t> bits_;
};

// Dropout's multipliers of one run of lines at a time, as the loops of group_norm_silu read them.
template <typename F>
class Gains {
 public:
  Gains(const DropoutBits& bits, bool evens_first) : bits_(bits), evens_first_(evens_first) {}

  // Those of the elements [offset, offset + n) of some lines; null without dropout.
  const F* of(int64_t line, int64_t lines, int64_t offset, int64_t n) {
    if (!bits_.any()) return nullptr;
    memory_.resize(std::max<size_t>(memory_.size(), lines * n));
    bits_.multipliers(line, lines, offset, n, evens_first_, memory_.data());
    return memory_.data();
  }

  // Calls body(first, count, gain) for parts of the lines whose multipliers fit in the L1 cache.
  template <typename Body>
  void for_parts(int64_t line, int64_t lines, int64_t offset, int64_t n, const Body& body) {
    const int64_t step = bits_.any() ? std::max<int64_t>(4, kElements / n / 4 * 4) : lines;
    for (int64_t first = 0; first < lines; first += step) {
      const int64_t count = std::min(step, lines - first);
      body(first, count, of(line + first, count, offset, n));
    }
  }

 private:
  static constexpr int64_t kElements = 4096;

  const DropoutBits& bits_;
  const bool evens_first_;
  std::vector<F> memory_;
};

}  // namespace fastdiff::cpu
