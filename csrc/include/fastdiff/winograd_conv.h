#pragma once

#include <cstdint>

#include "fastdiff/macros.h"

namespace fastdiff {

// y = conv3x3(x) + bias + residual, stride 1 and one pixel of zeros around, by Winograd's
// F(2x2, 3x3) (Lavin & Gray 2015, arXiv 1509.09308): a tile of 2x2 results is
// A^T [sum over channels of (G g G^T) * (B^T d B)] A, of 4x4 inputs d. 16 products in place of 36.
//
// With `upsample` x is doubled by repeating pixels first. Then the third of the four points of each
// axis is 0, so that 9 products are left.
//
// All float32, channels_last, without gaps. H and W are those of y, and even.
struct WinogradConvArgs {
  float* y;               // (B, H, W, O)
  const float* x;         // (B, H, W, C), or (B, H/2, W/2, C) with `upsample`
  const float* weight;    // (O / kWinogradBlock, P, C, kWinogradBlock), the last block half as wide
  const float* bias;      // (O,) or null
  const float* residual;  // like y, or null
  int64_t batch, height, width, channels, out_channels;  // channels: multiples of kWinogradLanes
  bool upsample;
};

constexpr int64_t kWinogradLanes = 16;  // channels that lie together in the loops
constexpr int64_t kWinogradBlock = 32;  // output channels that are computed together

FASTDIFF_HD constexpr int64_t winograd_points(bool upsample) { return upsample ? 9 : 16; }

}  // namespace fastdiff
