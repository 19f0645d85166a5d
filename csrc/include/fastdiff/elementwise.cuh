#pragma once

// The common shape of elementwise kernels: a block works on one chunk of one sample, so that the
// sample's coefficients and key are read once; a thread handles V consecutive elements.

#include <climits>

#include "fastdiff/layout.h"
#include "fastdiff/philox.h"

#if defined(__CUDACC__)
#include "fastdiff/vector_io.cuh"
#endif

namespace fastdiff {

constexpr int kElementwiseThreads = 128;

// Chunks are kElementwiseThreads * V elements, or more where the grid would pass its limit; chunks
// of which something is staged in shared memory are whole pixels.
struct ChunkPlan {
  int64_t elements;  // per chunk
  int64_t per_sample;
  bool stage_noise;  // generate the chunk's noise into shared memory, in memory order
  int head_bytes;    // per element, of model outputs that are staged (model_heads.cuh)

  bool whole_pixels() const { return stage_noise || head_bytes > 0; }
  // Whether the grid is within the device's limit; a launcher refuses what is not.
  bool fits(const SampleLayout& layout) const { return layout.batch <= INT_MAX / per_sample; }
  unsigned blocks(const SampleLayout& layout) const {
    return static_cast<unsigned>(layout.batch * per_sample);
  }
  unsigned shared_bytes() const {
    return static_cast<unsigned>(elements * ((stage_noise ? sizeof(float) : 0) + head_bytes));
  }
};

// In a channels_last tensor the four normals of a Philox block lie `inner` elements apart. Staging
// makes each block once; above 256 channels 16 pixels no longer fit in 16 KB, and the scalar kernel
// lets every element make its own block.
inline bool vectors_of_noise(const SampleLayout& layout) { return layout.inner <= 256; }

inline ChunkPlan plan_chunks(const SampleLayout& layout, int vector, bool generated,
                             int head_bytes = 0) {
  ChunkPlan plan{};
  plan.stage_noise = generated && layout.inner > 1 && vector > 1;
  plan.head_bytes = vector > 1 ? head_bytes : 0;
  plan.elements = kElementwiseThreads * vector;
  if (plan.whole_pixels()) {
    const int64_t pixels = plan.elements / layout.inner / 16 * 16;
    plan.elements = layout.inner * (pixels > 16 ? pixels : 16);
  }
  plan.per_sample = (layout.numel + plan.elements - 1) / plan.elements;
  while (!plan.whole_pixels() && plan.per_sample > 1 && !plan.fits(layout)) {
    plan.elements *= 2;
    plan.per_sample = (layout.numel + plan.elements - 1) / plan.elements;
  }
  return plan;
}

// Elements [begin, begin + count) of `sample`, in memory order.
struct Chunk {
  int64_t sample;
  int64_t begin;
  int64_t count;
};

#if defined(__CUDACC__)

__device__ __forceinline__ Chunk block_chunk(const SampleLayout& layout, const ChunkPlan& plan) {
  Chunk chunk;
  chunk.sample = blockIdx.x / plan.per_sample;
  chunk.begin = (blockIdx.x - chunk.sample * plan.per_sample) * plan.elements;
  chunk.count = min(plan.elements, layout.numel - chunk.begin);
  return chunk;
}

// The normal of one logical element; its three neighbours are thrown away.
__device__ __forceinline__ float normal_element(uint64_t key, uint64_t stream, int64_t element) {
  const Normals n = normal_block(key, stream, static_cast<uint64_t>(element) / 4);
  const int k = static_cast<int>(element & 3);
  const float low = k & 1 ? n.n1 : n.n0, high = k & 1 ? n.n3 : n.n2;
  return k & 2 ? high : low;
}

// Fills staged[i], i < chunk.count, with the normals of a channels_last chunk of whole pixels.
__device__ __forceinline__ void stage_normals(const SampleLayout& layout, const Chunk& chunk,
                                              uint64_t key, uint64_t stream, float* staged) {
  const int channels = static_cast<int>(layout.inner);
  const int pixels = static_cast<int>(chunk.count / channels);
  const int64_t pixels_per_channel = layout.numel / layout.inner;
  const int64_t first_pixel = chunk.begin / channels;
  const int blocks = pixels / 4 + 2;  // a run of pixels may start and end inside a Philox block
  for (int i = threadIdx.x; i < channels * blocks; i += blockDim.x) {
    const int c = i / blocks;
    const int64_t start = c * pixels_per_channel + first_pixel;
    const int64_t block = start / 4 + (i - c * blocks);
    const int p = static_cast<int>(4 * block - start);
    if (p >= pixels) continue;
    const Normals normals = normal_block(key, stream, static_cast<uint64_t>(block));
    const float n[4] = {normals.n0, normals.n1, normals.n2, normals.n3};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (p + k >= 0 && p + k < pixels) staged[(p + k) * channels + c] = n[k];
    }
  }
  __syncthreads();
}

// Normals of the V elements from memory index `first` of the chunk's sample.
template <int V>
__device__ __forceinline__ void chunk_normals(const SampleLayout& layout, const Chunk& chunk,
                                              int64_t first, uint64_t key, uint64_t stream,
                                              const float* staged, float out[V]) {
  if constexpr (V == 1) {
    out[0] = normal_element(key, stream, layout.logical_index(first));
  } else if (staged) {
    const float4* source = reinterpret_cast<const float4*>(staged + (first - chunk.begin));
#pragma unroll
    for (int v = 0; v < V / 4; ++v) {
      const float4 n = source[v];
      out[4 * v] = n.x, out[4 * v + 1] = n.y, out[4 * v + 2] = n.z, out[4 * v + 3] = n.w;
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      const Normals n = normal_block(key, stream, static_cast<uint64_t>(first + v) / 4);
      out[v] = n.n0, out[v + 1] = n.n1, out[v + 2] = n.n2, out[v + 3] = n.n3;
    }
  }
}

// The key of the chunk's sample and, in channels_last, the chunk's normals in shared memory. `Args`
// is the argument struct of any op with noise: layout, mode, noise, source. All threads of the
// block call the constructor.
template <typename Noise, typename Args>
struct ChunkNoise {
  const Args& args;
  const Chunk& chunk;
  uint64_t key;
  float* staged;

  __device__ __forceinline__ ChunkNoise(const Args& args, const ChunkPlan& plan, const Chunk& chunk,
                                        float4* shared)
      : args(args), chunk(chunk) {
    key = args.mode == NoiseMode::kGenerated ? args.source.key(chunk.sample) : 0;
    staged = plan.stage_noise ? reinterpret_cast<float*>(shared) : nullptr;
    if (staged) stage_normals(args.layout, chunk, key, args.source.stream, staged);
  }

  // Noise of the V elements from memory index `first` of the sample, given or generated.
  template <int V>
  __device__ __forceinline__ void load(int64_t first, float out[V]) const {
    if (args.mode == NoiseMode::kGenerated) {
      chunk_normals<V>(args.layout, chunk, first, key, args.source.stream, staged, out);
    } else {
      const int64_t base = chunk.sample * args.layout.numel;
      load_vector<V>(static_cast<const Noise*>(args.noise) + base + first, out);
    }
  }
};

#endif  // __CUDACC__

}  // namespace fastdiff
