#pragma once

// What winograd_conv.cpp needs of every instruction set.

#include "fastdiff/winograd_conv.h"

namespace fastdiff::cpu {

// The transformed inputs of `rows` tiles lie in memory as (P, C / 16, rows, 16): the rows that one
// step of a product takes are neighbours. A line between the points, P, keeps them from falling
// into the same set of the L1 cache.
struct WinogradLayout {
  int64_t rows, channels, points;

  int64_t point_stride() const { return channels * rows + kWinogradLanes; }
  int64_t input_floats() const { return points * point_stride(); }
  int64_t product_stride() const { return rows * kWinogradBlock + kWinogradLanes; }
  int64_t product_floats() const { return points * product_stride(); }
};

struct WinogradLoops {
  // Transforms tiles [begin, end) of the image into `inputs`, whose first tile is `first`. `zeros`
  // has a zero for every channel.
  void (*transform)(const WinogradConvArgs& args, const WinogradLayout& layout, int64_t first,
                    int64_t begin, int64_t end, const float* zeros, float* inputs);
  // The results of tiles [first, first + rows) in the output channels of one block.
  void (*multiply)(const WinogradConvArgs& args, const WinogradLayout& layout, int64_t first,
                   int64_t block, const float* inputs, float* products);
  int64_t panel_rows;  // of one step of a product
};

WinogradLoops winograd_loops_portable();
// Defined where FASTDIFF_HAS_CLONES (simd.h).
WinogradLoops winograd_loops_avx2();
WinogradLoops winograd_loops_avx512();

}  // namespace fastdiff::cpu
