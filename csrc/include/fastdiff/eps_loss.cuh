#pragma once

#include "fastdiff/eps_loss.h"
#include "fastdiff/reduce.cuh"

namespace fastdiff {

// Calls body(kind) with the kind as a compile-time constant: the branch is uniform over the grid.
template <LossKind Kind>
struct kind_is {
  static constexpr LossKind value = Kind;
};

template <typename F>
__device__ __forceinline__ void dispatch_kind(LossKind kind, const F& body) {
  if (kind == LossKind::kMse) {
    body(kind_is<LossKind::kMse>{});
  } else if (kind == LossKind::kL1) {
    body(kind_is<LossKind::kL1>{});
  } else {
    body(kind_is<LossKind::kHuber>{});
  }
}

// A thread's part of the sum over a chunk.
template <typename Prediction, typename Noise, int V>
__device__ __forceinline__ float chunk_loss(const EpsLossArgs& args, const ChunkPlan& plan,
                                            const Chunk& chunk, float4* shared) {
  const Prediction* prediction =
      static_cast<const Prediction*>(args.prediction) + chunk.sample * args.layout.numel;
  const ChunkNoise<Noise, EpsLossArgs> noise(args, plan, chunk, shared);
  float sum = 0.0f;
  for (int64_t i = chunk.begin + threadIdx.x * V; i < chunk.begin + chunk.count;
       i += kElementwiseThreads * V) {
    float p[V], n[V];
    load_vector<V>(prediction + i, p);
    noise.template load<V>(i, n);
    dispatch_kind(args.kind, [&](auto kind) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum += loss_term<decltype(kind)::value>(p[v] - n[v]);
    });
  }
  return sum;
}

// One pass: reads the prediction (and the noise if given), writes one partial sum per block; or, if
// every block has a whole sample, its loss: then there is no second stage.
template <typename Prediction, typename Noise, int V>
__global__ void __launch_bounds__(kElementwiseThreads)
    eps_loss_fwd_kernel(const EpsLossArgs args, const ChunkPlan plan, const bool whole_samples,
                        const float scale) {
  extern __shared__ float4 shared[];
  const Chunk chunk = block_chunk(args.layout, plan);
  float sum = block_sum(chunk_loss<Prediction, Noise, V>(args, plan, chunk, shared));
  if (threadIdx.x > 0) return;
  float* results = static_cast<float*>(args.partials);
  if (whole_samples) {  // block k has sample k
    const float* weight = static_cast<const float*>(args.weight);
    sum *= weight ? weight[blockIdx.x] : 1.0f;
    sum *= scale;
    results = static_cast<float*>(args.out);
  }
  results[blockIdx.x] = sum;
}

// The same for the sum over a batch of small samples: a block adds up so many `samples`, weighted.
template <typename Prediction, typename Noise, int V>
__global__ void __launch_bounds__(kElementwiseThreads)
    eps_loss_small_fwd_kernel(const EpsLossArgs args, const ChunkPlan plan, const int samples) {
  extern __shared__ float4 shared[];
  const float* weight = static_cast<const float*>(args.weight);
  const int64_t first = int64_t{blockIdx.x} * samples;
  float sum = 0.0f;
  for (int64_t k = first; k < min(first + samples, args.layout.batch); ++k) {
    if (plan.stage_noise && k > first) __syncthreads();  // the last sample's noise was read
    const Chunk chunk{k, 0, args.layout.numel};
    const float loss = chunk_loss<Prediction, Noise, V>(args, plan, chunk, shared);
    sum += loss * (weight ? weight[k] : 1.0f);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) static_cast<float*>(args.partials)[blockIdx.x] = sum;
}

// One pass: reads the prediction (and the noise if given), writes the gradients asked for.
template <typename Prediction, typename Noise, int V>
__global__ void __launch_bounds__(kElementwiseThreads)
    eps_loss_bwd_kernel(const EpsLossArgs args, const ChunkPlan plan, const float scale) {
  extern __shared__ float4 shared[];
  const Chunk chunk = block_chunk(args.layout, plan);
  const int64_t base = chunk.sample * args.layout.numel;
  const Prediction* prediction = static_cast<const Prediction*>(args.prediction) + base;
  const ChunkNoise<Noise, EpsLossArgs> noise(args, plan, chunk, shared);
  float factor = scale * static_cast<const float*>(
                             args.grad)[args.reduction == Reduction::kNone ? chunk.sample : 0];
  if (args.weight) factor *= static_cast<const float*>(args.weight)[chunk.sample];

  for (int64_t i = chunk.begin + threadIdx.x * V; i < chunk.begin + chunk.count;
       i += kElementwiseThreads * V) {
    float p[V], n[V];
    load_vector<V>(prediction + i, p);
    noise.template load<V>(i, n);
    dispatch_kind(args.kind, [&](auto kind) {
#pragma unroll
      for (int v = 0; v < V; ++v) p[v] = factor * loss_slope<decltype(kind)::value>(p[v] - n[v]);
    });
    if (args.grad_prediction) {
      store_vector<V>(static_cast<Prediction*>(args.grad_prediction) + base + i, p);
    }
    if (args.grad_noise) {
#pragma unroll
      for (int v = 0; v < V; ++v) n[v] = -p[v];
      store_vector<V>(static_cast<Noise*>(args.grad_noise) + base + i, n);
    }
  }
}

}  // namespace fastdiff
