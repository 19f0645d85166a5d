#pragma once

#include "fastdiff/elementwise.cuh"
#include "fastdiff/philox_normal.h"
#include "fastdiff/vector_io.cuh"

namespace fastdiff {

template <typename Out, int V>
__global__ void __launch_bounds__(kElementwiseThreads)
    philox_normal_kernel(const PhiloxNormalArgs args, const ChunkPlan plan) {
  extern __shared__ float4 shared[];
  const SampleLayout& layout = args.layout;
  const Chunk chunk = block_chunk(layout, plan);
  Out* out = static_cast<Out*>(args.out) + chunk.sample * layout.numel;
  const uint64_t key = args.noise.key(chunk.sample);
  float* staged = plan.stage_noise ? reinterpret_cast<float*>(shared) : nullptr;
  if (staged) stage_normals(layout, chunk, key, args.noise.stream, staged);

  for (int64_t i = chunk.begin + threadIdx.x * V; i < chunk.begin + chunk.count;
       i += kElementwiseThreads * V) {
    float n[V];
    chunk_normals<V>(layout, chunk, i, key, args.noise.stream, staged, n);
    store_vector<V>(out + i, n);
  }
}

}  // namespace fastdiff
