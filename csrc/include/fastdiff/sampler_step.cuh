#pragma once

#include "fastdiff/elementwise.cuh"
#include "fastdiff/sampler_step.h"
#include "fastdiff/vector_io.cuh"

namespace fastdiff {

// Reads V elements of one half of the model output, for the elements from memory index i of x_t. A
// channels_last output with two heads has C mean and C variance channels in every pixel: vectors fit
// only if C divides by V, else elements are gathered.
template <int V, typename Output>
__device__ __forceinline__ void load_head(const Output* in, const SampleLayout& layout,
                                          bool strided, int64_t i, float out[V]) {
  if (!strided) {
    load_vector<V>(in + i, out);
    return;
  }
  const int64_t pixel = i / layout.inner;
  if (layout.inner % V == 0) {
    load_vector<V>(in + i + pixel * layout.inner, out);
    return;
  }
  int64_t gap = pixel * layout.inner, next = gap + layout.inner;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (i + v == next) gap = next, next += layout.inner;
    out[v] = to_float(__ldg(in + i + v + gap));
  }
}

// One pass over a chunk: reads x_t, the model output(s) and the noise if given, writes x_s and, if
// asked for, x0. The options are uniform over the grid, so their branches cost nothing.
template <bool Learned, typename X, typename Output, int V>
__device__ __forceinline__ void sampler_step_chunk(const SamplerStepArgs& args,
                                                   const ChunkPlan& plan, float4* shared) {
  const SampleLayout& layout = args.layout;
  const Chunk chunk = block_chunk(layout, plan);
  const int64_t base = chunk.sample * layout.numel;
  const int64_t output_base = args.output_base(chunk.sample);
  const bool strided = args.output_strided();
  const X* x_t = static_cast<const X*>(args.x_t) + base;
  const Output* cond = static_cast<const Output*>(args.model_output) + output_base;
  const Output* uncond = static_cast<const Output*>(args.uncond) + output_base;
  const float scale = static_cast<float>(args.guidance_scale);
  const StepRow<float> row = step_row<float>(args.columns(chunk.sample), args.options());
  const ChunkNoise<X, SamplerStepArgs> noise(args, plan, chunk, shared);

  for (int64_t i = chunk.begin + threadIdx.x * V; i < chunk.begin + chunk.count;
       i += kElementwiseThreads * V) {
    float x[V], output[V], x0[V];
    load_vector<V>(x_t + i, x);
    load_head<V>(cond, layout, strided, i, output);
    if (args.uncond) {
      float other[V];
      load_head<V>(uncond, layout, strided, i, other);
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
        load_head<V>(cond + args.variance_offset(), layout, strided, i, output);
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
