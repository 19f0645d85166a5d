#pragma once

#include "fastdiff/group_norm_silu_backward.cuh"

namespace fastdiff {

constexpr int kParameterThreads = 256;

// The gradients of weight and bias: sums over the rows of the workspace, of 32 channels per block.
// Warp w adds the rows w, w + 8, ..., and the warps are added in their order.
template <typename T>
__global__ void __launch_bounds__(kParameterThreads)
    group_norm_silu_bwd_parameters_kernel(const GroupNormSiluBackwardArgs args,
                                          const GroupNormPlan plan, const int64_t first_block) {
  constexpr int kWarps = kParameterThreads / 32;
  __shared__ float2 warps[kWarps][32];
  const GroupNormLayout& layout = args.layout;
  const GradientWorkspace workspace(args.workspace, layout, plan);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t channel = (first_block + blockIdx.x) * 32 + lane;
  const bool inside = channel < layout.channels;
  float2 total = make_float2(0.0f, 0.0f);
  for (int64_t row = warp; inside && row < workspace.rows; row += kWarps) {
    const float* from = workspace.parameters + row * layout.channels + channel;
    total.x += from[0];
    total.y += from[workspace.rows * layout.channels];
  }
  warps[warp][lane] = total;
  __syncthreads();
  if (warp || !inside) return;
  for (int w = 1; w < kWarps; ++w) total.x += warps[w][lane].x, total.y += warps[w][lane].y;
  store_gradient<T>(args.grad_bias, channel, total.x);
  store_gradient<T>(args.grad_weight, channel, total.y);
}

}  // namespace fastdiff
