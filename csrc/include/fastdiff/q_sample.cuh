#pragma once

#include "fastdiff/elementwise.cuh"
#include "fastdiff/q_sample.h"
#include "fastdiff/vector_io.cuh"

namespace fastdiff {

// One pass: reads x0 (and noise if given), writes x_t. V elements per thread, or one where shapes
// or pointers do not allow vectors. The mode is uniform over the grid, so its branches cost
// nothing.
template <typename Out, typename X0, typename Noise, int V>
__global__ void __launch_bounds__(kElementwiseThreads)
    q_sample_fwd_kernel(const QSampleArgs args, const ChunkPlan plan) {
  extern __shared__ float4 shared[];
  const SampleLayout& layout = args.layout;
  const Chunk chunk = block_chunk(layout, plan);
  const int64_t base = chunk.sample * layout.numel;
  const X0* x0 = static_cast<const X0*>(args.x0) + base;
  Out* out = static_cast<Out*>(args.out) + base;

  // Timesteps outside the tables give NaN: visible, and no read out of bounds.
  const int64_t t = args.t[chunk.sample];
  const bool valid = t >= 0 && t < args.num_timesteps;
  const float a = valid ? args.sqrt_alpha_bar[t] : NAN;
  const float b = valid ? args.sqrt_one_minus_alpha_bar[t] : NAN;
  const bool flip = args.flip && args.flip[chunk.sample];

  const ChunkNoise<Noise, QSampleArgs> noise(args, plan, chunk, shared);

  for (int64_t i = chunk.begin + threadIdx.x * V; i < chunk.begin + chunk.count;
       i += kElementwiseThreads * V) {
    float x[V], y[V];
    if (flip) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = to_float(__ldg(x0 + layout.flipped_index(i + v)));
    } else {
      load_vector<V>(x0 + i, x);
    }
    if (args.mode == NoiseMode::kNone) {
#pragma unroll
      for (int v = 0; v < V; ++v) y[v] = a * x[v];
    } else {
      float n[V];
      noise.template load<V>(i, n);
#pragma unroll
      for (int v = 0; v < V; ++v) y[v] = q_sample(a, b, x[v], n[v]);
    }
    store_vector<V>(out + i, y);
  }
}

}  // namespace fastdiff
