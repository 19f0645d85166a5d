#pragma once

#include "fastdiff/sampler_step.cuh"

namespace fastdiff {

template <typename X, typename Output, bool Tiled, int V>
__global__ void __launch_bounds__(kElementwiseThreads)
    ddpm_step_fwd_kernel(const SamplerStepArgs args, const ChunkPlan plan) {
  extern __shared__ float4 shared[];
  sampler_step_chunk<true, X, Output, Tiled, V>(args, plan, shared);
}

}  // namespace fastdiff
