#pragma once

#include "fastdiff/model_heads.cuh"
#include "fastdiff/sampler_step.h"

namespace fastdiff {

// One pass over a chunk: reads x_t, the model output(s) and the noise if given, writes x_s and, if
// asked for, x0. The options are uniform over the grid, so their branches cost nothing.
template <bool Learned, typename X, typename Output, bool Tiled, int V>
__device__ __forceinline__ void sampler_step_chunk(const SamplerStepArgs& args,
                                                   const ChunkPlan& plan, float4* shared) {
  const SampleLayout& layout = args.layout;
  const Chunk chunk = block_chunk(layout, plan);
  const int64_t base = chunk.sample * layout.numel;
  const X* x_t = static_cast<const X*>(args.x_t) + base;
  const ModelHeads<Output, Tiled> cond(args, plan, chunk, args.model_output, 0, shared);
  const ModelHeads<Output, Tiled> uncond(args, plan, chunk, args.uncond, 1, shared);
  const float scale = static_cast<float>(args.guidance_scale);
  const StepRow<float> row = step_row<float>(args.columns(chunk.sample), args.options());
  if constexpr (Tiled) {
    cond.stage();
    if (args.uncond) uncond.stage();
    __syncthreads();
  }
  const ChunkNoise<X, SamplerStepArgs> noise(args, plan, chunk, shared);

  for (int64_t i = chunk.begin + threadIdx.x * V; i < chunk.begin + chunk.count;
       i += kElementwiseThreads * V) {
    float x[V], output[V], x0[V];
    load_vector<V>(x_t + i, x);
    cond.template load<V>(0, i, output);
    if (args.uncond) {
      float other[V];
      uncond.template load<V>(0, i, other);
#pragma unroll
      for (int v = 0; v < V; ++v) output[v] = guided(output[v], other[v], scale);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) x0[v] = step_x0(row, x[v], output[v]);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = step_mean(row, x[v], output[v], x0[v]);
    if (args.mode != NoiseMode::kNone) {
      float n[V];
      noise.template load<V>(i, n);
      if (Learned && args.learned) {
        cond.template load<V>(1, i, output);
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] += step_sigma(row, output[v]) * n[v];
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] += row.sigma * n[v];
      }
    }
    store_vector<V>(static_cast<X*>(args.x_s) + base + i, x);
    if (args.pred_x0) store_vector<V>(static_cast<X*>(args.pred_x0) + base + i, x0);
  }
}

}  // namespace fastdiff
