#pragma once

// Deterministic sums over the elements of every sample, in two stages and without atomics: a block
// sums one chunk of one sample, then a warp adds a sample's chunks. The order depends only on the
// sample's own shape, so its sum does not change with the batch around it.

#include "fastdiff/elementwise.cuh"
#if defined(__CUDACC__)
#include "fastdiff/launch.cuh"
#endif

namespace fastdiff {

constexpr int64_t kReductionChunks = 512;
constexpr int kFinishThreads = 1024;
constexpr int64_t kDeviceBlocks = 116;  // seven eighths of the multiprocessors of an H100

// As plan_chunks, with chunks that grow until a sample has fewer than twice kReductionChunks of
// them: enough to fill a device at batch 1, few enough that the second stage is short.
inline ChunkPlan plan_reduction(const SampleLayout& layout, int vector, bool generated,
                                int head_bytes = 0) {
  ChunkPlan plan = plan_chunks(layout, vector, generated, head_bytes);
  if (!plan.whole_pixels() && plan.per_sample > kReductionChunks) {
    plan.elements *= plan.per_sample / kReductionChunks;
    plan.per_sample = (layout.numel + plan.elements - 1) / plan.elements;
  }
  return plan;
}

#if defined(__CUDACC__)

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  return x;
}

// N sums over a block of whole warps, in every lane of the first one. Once per kernel: a second
// call would need a barrier before it.
template <int N>
__device__ __forceinline__ void block_sums(float (&x)[N]) {
  __shared__ float warps[N][32];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = warp_sum(x[k]);
    if (lane == 0) warps[k][threadIdx.x / 32] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = warp_sum(lane < blockDim.x / 32 ? warps[k][lane] : 0.0f);
}

__device__ __forceinline__ float block_sum(float x) {
  float sums[1] = {x};
  block_sums(sums);
  return sums[0];
}

// Second stage: out[k] = scale weight[k] (sum of partials[k, :]), or with `total` one value, their
// sum over k, from a single block. A warp per sample.
static __global__ void __launch_bounds__(kFinishThreads)
    finish_sums_kernel(float* out, const float* partials, const float* weight, int64_t batch,
                       int64_t per_sample, float scale, bool total) {
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  float sum = 0.0f;
  for (int64_t sample = int64_t{blockIdx.x} * warps + threadIdx.x / 32; sample < batch;
       sample += int64_t{gridDim.x} * warps) {
    float mine = 0.0f;
    for (int64_t i = lane; i < per_sample; i += 32) mine += partials[sample * per_sample + i];
    mine = warp_sum(mine) * (weight ? weight[sample] : 1.0f);
    if (!total && lane == 0) out[sample] = scale * mine;
    sum += mine;
  }
  if (!total) return;
  sum = block_sum(lane == 0 ? sum : 0.0f);
  if (threadIdx.x == 0) out[0] = scale * sum;
}

inline cudaError_t finish_sums(float* out, const float* partials, const float* weight,
                               int64_t batch, int64_t per_sample, double scale, bool total,
                               cudaStream_t stream) {
  const int threads = total ? kFinishThreads : kElementwiseThreads;
  const int64_t warps = threads / 32;
  const int64_t blocks = total ? 1 : (batch + warps - 1) / warps;
  return launch_kernel(finish_sums_kernel, blocks, threads, 0, stream, out, partials, weight, batch,
                       per_sample, static_cast<float>(scale), total);
}

#endif  // __CUDACC__

}  // namespace fastdiff
