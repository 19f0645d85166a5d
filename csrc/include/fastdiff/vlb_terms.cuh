#pragma once

#include "fastdiff/reduce.cuh"
#include "fastdiff/sampler_step.cuh"
#include "fastdiff/vlb_terms.h"

namespace fastdiff {

// V elements of every input of a chunk's sample.
template <typename Data, typename Output, int V>
struct VlbVector {
  float x0[V], x[V], output[V], v[V], noise[V];

  template <bool Tiled>
  __device__ __forceinline__ void load(const VlbTermsArgs& args,
                                       const ModelHeads<Output, Tiled>& heads, int64_t i) {
    const int64_t base = heads.chunk.sample * args.layout.numel;
    load_vector<V>(static_cast<const Data*>(args.x0) + base + i, x0);
    load_vector<V>(static_cast<const Data*>(args.x_t) + base + i, x);
    heads.template load<V>(0, i, output);
    if (args.learned) heads.template load<V>(1, i, v);
  }

  __device__ __forceinline__ VlbVariance variance(const VlbTermsArgs& args, const VlbRow& row,
                                                  const VlbVariance& fixed, int k) const {
    return args.learned ? vlb_variance(row, v[k]) : fixed;
  }

  template <bool First>
  __device__ __forceinline__ void add(const VlbTermsArgs& args, const VlbRow& row,
                                      const VlbVariance& fixed, float (&sums)[3]) const {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const VlbVariance own = variance(args, row, fixed, k);
      const VlbElement e = vlb_element(row, own, x0[k], x[k], output[k], noise[k]);
      sums[0] += vlb_nats<First>(own, e, x0[k]);
      sums[1] += e.x0_error * e.x0_error;
      sums[2] += e.eps_error * e.eps_error;
    }
  }

  // Replaces the model's output with its gradient.
  template <bool First>
  __device__ __forceinline__ void differentiate(const VlbTermsArgs& args, const VlbRow& row,
                                                const VlbVariance& fixed,
                                                const VlbGradients& grad) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const VlbSlopes slopes = vlb_slopes<First>(row, variance(args, row, fixed, k), grad, x0[k],
                                                 x[k], output[k], noise[k]);
      output[k] = slopes.output;
      v[k] = slopes.v;
    }
  }
};

// One pass: reads every input, writes a block's three partial sums. Whether a sample's term is the
// decoder's is uniform over the block.
template <typename Data, typename Output, bool Tiled, int V>
__global__ void __launch_bounds__(kElementwiseThreads)
    vlb_terms_fwd_kernel(const VlbTermsArgs args, const ChunkPlan plan) {
  extern __shared__ float4 shared[];
  const Chunk chunk = block_chunk(args.layout, plan);
  const VlbRow row = args.row(chunk.sample);
  const VlbVariance fixed = vlb_variance(row, 0.0f);
  const ModelHeads<Output, Tiled> heads(args, plan, chunk, args.model_output, 0, shared);
  if constexpr (Tiled) {
    heads.stage();
    __syncthreads();
  }
  const ChunkNoise<Data, VlbTermsArgs> noise(args, plan, chunk, shared);

  float sums[3] = {};
  for (int64_t i = chunk.begin + threadIdx.x * V; i < chunk.begin + chunk.count;
       i += kElementwiseThreads * V) {
    VlbVector<Data, Output, V> elements;
    elements.load(args, heads, i);
    noise.template load<V>(i, elements.noise);
    if (row.first) {
      elements.template add<true>(args, row, fixed, sums);
    } else {
      elements.template add<false>(args, row, fixed, sums);
    }
  }
  block_sums(sums);
  if (threadIdx.x == 0) {
    args.partials[blockIdx.x] = VlbTermsArgs::kBitsPerNat * sums[0];
    args.partials[gridDim.x + blockIdx.x] = sums[1];
    args.partials[2 * gridDim.x + blockIdx.x] = sums[2];
  }
}

// One pass: reads every input, writes the gradient of the model's output. Where the gradient of
// eps_mse is zero the noise is neither read nor made.
template <typename Data, typename Output, bool Tiled, int V>
__global__ void __launch_bounds__(kElementwiseThreads)
    vlb_terms_bwd_kernel(const VlbTermsArgs args, const ChunkPlan plan) {
  extern __shared__ float4 shared[];
  const Chunk chunk = block_chunk(args.layout, plan);
  const VlbRow row = args.row(chunk.sample);
  const VlbVariance fixed = vlb_variance(row, 0.0f);
  const VlbGradients grad = args.gradients(chunk.sample);
  const ModelHeads<Output, Tiled> heads(args, plan, chunk, args.model_output, 0, shared);
  if constexpr (Tiled) {
    heads.stage();
    __syncthreads();
  }
  const ChunkNoise<Data, VlbTermsArgs> noise(args, plan, chunk, shared);
  Output* out = static_cast<Output*>(args.grad_output) + args.output_base(chunk.sample);

  for (int64_t i = chunk.begin + threadIdx.x * V; i < chunk.begin + chunk.count;
       i += kElementwiseThreads * V) {
    VlbVector<Data, Output, V> elements;
    elements.load(args, heads, i);
    if (grad.eps_mse != 0.0f) {
      noise.template load<V>(i, elements.noise);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) elements.noise[k] = 0.0f;
    }
    if (row.first) {
      elements.template differentiate<true>(args, row, fixed, grad);
    } else {
      elements.template differentiate<false>(args, row, fixed, grad);
    }
    // A thread's elements of the tile are its own to overwrite.
    heads.template store<V>(out, 0, i, elements.output);
    if (args.learned) heads.template store<V>(out, 1, i, elements.v);
  }
  if constexpr (Tiled) heads.unstage(out);
}

}  // namespace fastdiff
