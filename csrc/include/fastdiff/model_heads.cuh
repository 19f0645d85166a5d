#pragma once

// Model outputs with two heads: 2C channels, first those of the prediction, then those of the
// variance. In a channels_last tensor the heads alternate, C and C, from pixel to pixel, and with
// few channels no vector fits into a head. There a block moves the 2C channels of its pixels
// between global and shared memory in whole vectors, and picks the elements of a head in shared
// memory.

#include "fastdiff/elementwise.cuh"

namespace fastdiff {

// Beyond these many channels a head of a pixel is long enough for vectors, if V divides C.
constexpr int kMaxStagedChannels = 16;

// Whether the accesses of V elements of `layout` fit the heads of a model output, or shared memory
// makes them fit.
inline bool vectors_of_heads(const SampleLayout& layout, bool strided, int vector) {
  return !strided || layout.inner <= kMaxStagedChannels || layout.inner % vector == 0;
}

// Bytes of shared memory per element of x for `outputs` strided model outputs of `type`.
inline int staged_head_bytes(const SampleLayout& layout, bool strided, int outputs, DType type) {
  return strided && layout.inner <= kMaxStagedChannels
             ? 2 * outputs * static_cast<int>(size_of(type))
             : 0;
}

#if defined(__CUDACC__)

// One sample's model output, as a block sees it that works on `chunk`. A template over Tiled, so
// that kernels without a tile keep its registers.
template <typename Output, bool Tiled>
struct ModelHeads {
  const SampleLayout& layout;
  const Chunk& chunk;
  const Output* sample;  // the whole sample
  Output* tile;          // Tiled: the chunk's pixels in shared memory, after the block's noise
  int64_t to_variance;   // from an element of the first head to its twin
  bool strided;

  // `output` is the model output number `number` of the op.
  template <typename Args>
  __device__ __forceinline__ ModelHeads(const Args& args, const ChunkPlan& plan, const Chunk& chunk,
                                        const void* output, int number, float4* shared)
      : layout(args.layout),
        chunk(chunk),
        sample(static_cast<const Output*>(output) + args.output_base(chunk.sample)),
        to_variance(args.variance_offset()),
        strided(args.output_strided()) {
    if constexpr (Tiled) {
      float* noise = reinterpret_cast<float*>(shared);
      tile = reinterpret_cast<Output*>(noise + (plan.stage_noise ? plan.elements : 0)) +
             2 * number * plan.elements;
    }
  }

  // Copies the chunk's pixels into the tile; the caller waits for the other threads.
  __device__ __forceinline__ void stage() const {
    constexpr int kPacket = 16 / sizeof(Output);
    const uint4* source = reinterpret_cast<const uint4*>(sample + 2 * chunk.begin);
    const int packets = static_cast<int>(2 * chunk.count / kPacket);
    for (int p = threadIdx.x; p < packets; p += kElementwiseThreads) {
      reinterpret_cast<uint4*>(tile)[p] = __ldg(source + p);
    }
  }

  // V elements of a head (0 or 1), for the elements from memory index i of x.
  template <int V>
  __device__ __forceinline__ void load(int head, int64_t i, float out[V]) const {
    if constexpr (Tiled) {
      each<V>(head, i, [&](Output& value, int v) { out[v] = to_float(value); });
    } else {
      load_vector<V>(sample + index(head, i), out);
    }
  }

  // The twin of load, for gradients: into the tile, or where there is none, to `out`, a sample.
  template <int V>
  __device__ __forceinline__ void store(Output* out, int head, int64_t i, const float in[V]) const {
    if constexpr (Tiled) {
      each<V>(head, i, [&](Output& value, int v) { value = from_float<Output>(in[v]); });
    } else {
      store_vector<V>(out + index(head, i), in);
    }
  }

  // Copies the tile to the chunk's pixels of `out`, a sample, once all threads have stored.
  __device__ __forceinline__ void unstage(Output* out) const {
    constexpr int kPacket = 16 / sizeof(Output);
    __syncthreads();
    uint4* target = reinterpret_cast<uint4*>(out + 2 * chunk.begin);
    const int packets = static_cast<int>(2 * chunk.count / kPacket);
    for (int p = threadIdx.x; p < packets; p += kElementwiseThreads) {
      __stwb(target + p, reinterpret_cast<const uint4*>(tile)[p]);
    }
  }

 private:
  __device__ __forceinline__ int64_t index(int head, int64_t i) const {
    return i + (strided ? i / layout.inner * layout.inner : 0) + head * to_variance;
  }

  // visit(element, v) for V elements of a head in the tile.
  template <int V, typename Visit>
  __device__ __forceinline__ void each(int head, int64_t i, const Visit& visit) const {
    const int channels = static_cast<int>(layout.inner);
    const int first = static_cast<int>(i - chunk.begin);
    int c = first % channels;
    Output* at = tile + 2 * first - c + head * channels;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      visit(*at, v);
      const bool next_pixel = ++c == channels;
      at += next_pixel ? channels + 1 : 1;
      c = next_pixel ? 0 : c;
    }
  }
};

#endif  // __CUDACC__

}  // namespace fastdiff
