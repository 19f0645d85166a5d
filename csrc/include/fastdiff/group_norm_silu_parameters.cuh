#pragma once

#include "fastdiff/group_norm_silu_backward.cuh"

namespace fastdiff {

constexpr int kParameterThreads = 256;

// The gradients of weight and bias: sums over the rows of the workspace, of the 32 channels of
// `block`. Warp w adds the rows w, w + 8, ..., and the warps are added in their order.
template <typename T>
__device__ __forceinline__ void add_parameter_rows(const GroupNormSiluBackwardArgs& args,
                                                   const GroupNormPlan& plan, int64_t block) {
  constexpr int kWarps = kParameterThreads / 32;
  __shared__ float2 warps[kWarps][32];
  const GroupNormLayout& layout = args.layout;
  const GradientWorkspace workspace(args.workspace, layout, plan);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t channel = block * 32 + lane;
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

// That of the bias of a sum, likewise.
template <typename T>
__device__ __forceinline__ void add_sum_rows(const GroupNormSiluBackwardArgs& args,
                                             const GroupNormPlan& plan, int64_t block) {
  constexpr int kWarps = kParameterThreads / 32;
  __shared__ float warps[kWarps][32];
  const int64_t channels = args.layout.channels;
  const GradientWorkspace workspace(args.workspace, args.layout, plan);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t channel = block * 32 + lane;
  const bool inside = channel < channels;
  float total = 0.0f;
  for (int64_t row = warp; inside && row < workspace.sum_rows; row += kWarps) {
    total += workspace.sums[row * channels + channel];
  }
  warps[warp][lane] = total;
  __syncthreads();
  if (warp || !inside) return;
  for (int w = 1; w < kWarps; ++w) total += warps[w][lane];
  store_gradient<T>(args.grad_sum_bias, channel, total);
}

template <typename T>
__global__ void __launch_bounds__(kParameterThreads)
    group_norm_silu_bwd_parameters_kernel(const GroupNormSiluBackwardArgs args,
                                          const GroupNormPlan plan, const int64_t first_block) {
  add_parameter_rows<T>(args, plan, first_block + blockIdx.x);
}

// Of a sum: half of the blocks for either.
template <typename T>
__global__ void __launch_bounds__(kParameterThreads)
    group_norm_silu_residual_bwd_parameters_kernel(const GroupNormSiluBackwardArgs args,
                                                   const GroupNormPlan plan,
                                                   const int64_t first_block) {
  const int64_t block = first_block + blockIdx.x, half = (args.layout.channels + 31) / 32;
  if (block >= half) {
    add_sum_rows<T>(args, plan, block - half);
  } else if (args.layout.batch > plan.samples) {
    add_parameter_rows<T>(args, plan, block);
  }
}

}  // namespace fastdiff
