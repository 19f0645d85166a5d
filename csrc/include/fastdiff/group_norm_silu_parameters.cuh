#pragma once

#include "fastdiff/group_norm_silu_backward.cuh"

namespace fastdiff {

constexpr int kParameterThreads = 256;

// The gradients of weight and bias: sums over the batch, of 32 channels per block. Warp w adds the
// samples w, w + 8, ..., and the warps are added in their order.
template <typename T>
__global__ void __launch_bounds__(kParameterThreads)
    group_norm_silu_bwd_parameters_kernel(const GroupNormSiluBackwardArgs args,
                                          const GroupNormPlan, const int64_t first_block) {
  constexpr int kWarps = kParameterThreads / 32;
  __shared__ float2 warps[kWarps][32];
  const GroupNormLayout& layout = args.layout;
  const float* sums = GradientWorkspace(args.workspace, layout).sums;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t channel = (first_block + blockIdx.x) * 32 + lane;
  const bool inside = channel < layout.channels;
  float2 total = make_float2(0.0f, 0.0f);
  for (int64_t sample = warp; inside && sample < layout.batch; sample += kWarps) {
    const int64_t i = sample * layout.channels + channel;
    const float factor = 1.0f + load_operand<T>(args.scale, sample, channel, 0.0f);
    total.x += factor * sums[i];
    total.y += factor * sums[layout.batch * layout.channels + i];
  }
  warps[warp][lane] = total;
  __syncthreads();
  if (warp || !inside) return;
  for (int w = 1; w < kWarps; ++w) total.x += warps[w][lane].x, total.y += warps[w][lane].y;
  store_gradient<T>(args.grad_bias, channel, total.x);
  store_gradient<T>(args.grad_weight, channel, total.y);
}

}  // namespace fastdiff
