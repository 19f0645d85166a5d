#pragma once

// What the kernels of group_norm_silu have in common: the walk over items, small operands, the
// activation, and sums in a fixed order.

#include "fastdiff/cluster.cuh"
#include "fastdiff/group_norm_silu_plan.cuh"
#include "fastdiff/vector_io.cuh"

namespace fastdiff {

// ---- items ----

// What one lane has of an item: `count` vectors, `stride` elements apart, from `offset` in the
// sample. Kept on chip, they are in `slot`, `slot + slot_stride`, ... `channel` is that of the
// first element, within the unit; in the contiguous layout it is that of all.
struct LaneItem {
  int number;  // of the item; its place in a block's partial sums is number - begin
  bool first;  // this lane leaves the partial sums
  int count;
  int channel;
  int slot;
  int slot_stride;
  int64_t offset;
  int64_t stride;
};

// Items [begin, end) of the channels from `first_channel`, one after another for each warp, or team
// of lanes. Every lane calls body; a lane with nothing to do has count 0.
template <bool ChannelsLast, int V, typename F>
__device__ __forceinline__ void for_items(const GroupNormLayout& layout,
                                          const GroupNormTiling& tiling, int64_t first_channel,
                                          int begin, int end, const F& body) {
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int team = lane / tiling.lanes, side = lane % tiling.lanes, teams = 32 / tiling.lanes;
  const int step = ChannelsLast ? 1 : teams;
  const int item_vectors = static_cast<int>(tiling.item_numel() / V);
  for (int i = begin + threadIdx.x / 32 * step; i < end; i += warps * step) {
    LaneItem item;
    item.number = ChannelsLast ? i : i + team;
    const int block = item.number / tiling.segments, segment = item.number % tiling.segments;
    const int64_t pixel = segment * tiling.segment_pixels;
    const int pixels = static_cast<int>(tiling.pixels_of(segment, layout.pixels));
    item.slot = (item.number - begin) * item_vectors;
    if constexpr (ChannelsLast) {
      const int row = tiling.block_channels / V;
      item.channel = block * tiling.block_channels + side * V;
      const bool inside = side < row && item.channel < tiling.channels;
      item.first = inside && team == 0;
      item.count = inside && team < pixels ? (pixels - team - 1) / teams + 1 : 0;
      item.slot += team * row + side;
      item.slot_stride = teams * row;
      item.offset = (pixel + team) * layout.channels + first_channel + item.channel;
      item.stride = teams * layout.channels;
    } else {
      const int vectors = item.number < end ? pixels / V : 0;
      item.channel = block;
      item.first = item.number < end && side == 0;
      item.count = side < vectors ? (vectors - side - 1) / tiling.lanes + 1 : 0;
      item.slot += side;
      item.slot_stride = tiling.lanes;
      item.offset = (first_channel + block) * layout.pixels + pixel + side * V;
      item.stride = tiling.lanes * V;
    }
    body(item);
  }
}

// Calls body(k, vectors) for the vectors k, k + 1, ... of a lane: `Batch` loads are under way
// before the first is used.
template <int Batch, typename Load, typename Body>
__device__ __forceinline__ void for_batches(int count, const Load& load, const Body& body) {
  using Loaded = decltype(load(0));
  int k = 0;
  for (; k + Batch <= count; k += Batch) {
    Loaded loaded[Batch];
#pragma unroll
    for (int r = 0; r < Batch; ++r) loaded[r] = load(k + r);
    body(k, loaded);
  }
  for (; k < count; ++k) {
    Loaded loaded[1] = {load(k)};
    body(k, loaded);
  }
}

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_global(const T* from) {
  using Access = typename Vector<T, V>::Access;
  Vector<T, V> vector;
  vector.packets[0] = __ldg(reinterpret_cast<const Access*>(from));
  return vector;
}

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_shared(const T* from) {
  using Access = typename Vector<T, V>::Access;
  Vector<T, V> vector;
  vector.packets[0] = *reinterpret_cast<const Access*>(from);
  return vector;
}

template <typename T, int V>
__device__ __forceinline__ void store_shared(T* to, const Vector<T, V>& vector) {
  using Access = typename Vector<T, V>::Access;
  *reinterpret_cast<Access*>(to) = vector.packets[0];
}

// An intrinsic, because the compiler splits a plain store of 16 bytes into its elements where it
// unrolls, and does not always join them again.
template <int V, typename T>
__device__ __forceinline__ void store_global(T* to, const float (&values)[V]) {
  using Access = typename Vector<T, V>::Access;
  Vector<T, V> vector;
#pragma unroll
  for (int v = 0; v < V; ++v) vector.values[v] = from_float<T>(values[v]);
  __stwb(reinterpret_cast<Access*>(to), vector.packets[0]);
}

// ---- small operands ----

// Of one channel of one sample; `neutral` if absent.
template <typename T>
__device__ __forceinline__ float load_operand(const ChannelVector& operand, int64_t sample,
                                              int64_t channel, float neutral) {
  if (!operand.data) return neutral;
  const int64_t i = sample * operand.row_stride + channel;
  if (sizeof(T) == 4 || operand.type == DType::kFloat32) {
    return __ldg(static_cast<const float*>(operand.data) + i);
  }
  return to_float(__ldg(static_cast<const T*>(operand.data) + i));
}

// The affine map of one channel of one sample.
template <typename T, typename Args>
__device__ __forceinline__ ChannelAffine<float> load_affine(const Args& args, int64_t sample,
                                                            int64_t channel, float rstd) {
  return channel_affine(rstd, load_operand<T>(args.weight, sample, channel, 1.0f),
                        load_operand<T>(args.bias, sample, channel, 0.0f),
                        load_operand<T>(args.scale, sample, channel, 0.0f),
                        load_operand<T>(args.shift, sample, channel, 0.0f));
}

// ---- the activation ----

// act(z) = z gate(z) with gate(z) = sigmoid(z) = 1 / (1 + exp(-z)), or 1 for the identity, where
// the exponential is that of -infinity. Without a branch, on which the compiler would split loops
// and with them 16-byte stores.
//
// With u = 2^-24, __expf(-z) is off by at most (1.5 |z| + 4) u and the quotient by 4 u, relatively.
// The first goes into z sigmoid(z) times 1 - sigmoid(z). As |z| (1 - sigmoid(z)) < 0.3 for z > 0,
// and |z| sigmoid(z) < 0.3 for z < 0, silu is off by at most (0.5 + 8) |z| u. Beyond |z| = 87 the
// exponential over- or underflows to the right limit.
struct Gate {
  float slope, offset;

  __device__ __forceinline__ explicit Gate(Activation activation)
      : slope(activation == Activation::kSilu ? -1.0f : 0.0f),
        offset(activation == Activation::kSilu ? 0.0f : -INFINITY) {}

  __device__ __forceinline__ float operator()(float z) const {
    return __fdividef(1.0f, 1.0f + __expf(slope * z + offset));
  }
  // act(z)
  __device__ __forceinline__ float activate(float z) const { return z * (*this)(z); }
  // grad act'(z)
  __device__ __forceinline__ float gradient(float grad, float z) const {
    const float s = (*this)(z);
    return grad * (s * (1.0f + z * (1.0f - s)));
  }
};

// ---- sums in a fixed order ----

// Count, mean and sum of squared deviations, merged as in Chan, Golub & LeVeque 1983: no sum of
// squares that cancels.
struct Moments {
  static constexpr int kFloats = 2;
  float n = 0.0f, mean = 0.0f, m2 = 0.0f;

  __device__ __forceinline__ void merge(const Moments& other) {
    const float total = n + other.n;
    // The approximate quotient of a number by itself need not be 1, which the mean of the first has
    // to be taken over with: those of a constant group are its value.
    const float weight = n > 0.0f ? __fdividef(other.n, total) : 1.0f;
    const float delta = other.mean - mean;
    mean += delta * weight;
    m2 += other.m2 + delta * delta * (n * weight);
    n = total;
  }
  __device__ __forceinline__ Moments other_lane(int offset) const {
    return {__shfl_xor_sync(~0u, n, offset), __shfl_xor_sync(~0u, mean, offset),
            __shfl_xor_sync(~0u, m2, offset)};
  }
  __device__ __forceinline__ float value(int k) const { return k == 0 ? mean : m2; }
  template <typename Load>
  static __device__ __forceinline__ Moments from(float n, const Load& load) {
    return {n, load(0), load(1)};
  }
};

// The sums of the backward pass: of dz, dz h_hat and h_hat, or with d in place of h_hat = d rstd.
struct GradientSums {
  static constexpr int kFloats = 3;
  float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f;

  __device__ __forceinline__ void merge(const GradientSums& other) {
    s0 += other.s0, s1 += other.s1, s2 += other.s2;
  }
  __device__ __forceinline__ GradientSums other_lane(int offset) const {
    return {__shfl_xor_sync(~0u, s0, offset), __shfl_xor_sync(~0u, s1, offset),
            __shfl_xor_sync(~0u, s2, offset)};
  }
  __device__ __forceinline__ float value(int k) const { return k == 0 ? s0 : k == 1 ? s1 : s2; }
  template <typename Load>
  static __device__ __forceinline__ GradientSums from(float, const Load& load) {
    return {load(0), load(1), load(2)};
  }
};

// Merges lanes whose numbers differ in the bits [low, high); the first of them has the result.
template <typename Sums>
__device__ __forceinline__ void merge_lanes(Sums& sums, int low, int high) {
  for (int offset = high / 2; offset >= low; offset /= 2) sums.merge(sums.other_lane(offset));
}

// As merge_lanes over a whole block; thread 0 has the result. `warps` is shared memory for one
// value per warp.
template <typename Sums>
__device__ __forceinline__ void merge_block(Sums& sums, Sums* warps) {
  merge_lanes(sums, 1, 32);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < blockDim.x / 32; ++warp) sums.merge(warps[warp]);
  }
}

// store(c, sum of load(c, i) over i < count), c < channels, by all threads of a block.
template <typename Sums, typename Load, typename Store>
__device__ __forceinline__ void merge_channels(int channels, int count, const Load& load,
                                               const Store& store) {
  int width = 1;
  while (width < count && width < 32) width *= 2;
  const int team = threadIdx.x / width, lane = threadIdx.x % width, teams = blockDim.x / width;
  for (int first = 0; first < channels; first += teams) {
    const int c = first + team;
    Sums sums;
    if (c < channels) {
      for (int i = lane; i < count; i += width) sums.merge(load(c, i));
    }
    merge_lanes(sums, 1, width);
    if (c < channels && lane == 0) store(c, sums);
  }
}

// The lanes' sums A per lane, as one partial sum per channel of an item, in shared memory.
template <bool ChannelsLast, int V, typename Sums, int A>
__device__ __forceinline__ void store_item(const GroupNormTiling& tiling, const LaneItem& item,
                                           int begin, Sums (&sums)[A], float* partials) {
  const int side = ChannelsLast ? item.channel % tiling.block_channels : 0;
  float* to = partials + ((item.number - begin) * tiling.block_channels + side) * Sums::kFloats;
#pragma unroll
  for (int a = 0; a < A; ++a) {
    if constexpr (ChannelsLast) {
      merge_lanes(sums[a], tiling.lanes, 32);
    } else {
      merge_lanes(sums[a], 1, tiling.lanes);
    }
    if (!item.first) continue;
#pragma unroll
    for (int k = 0; k < Sums::kFloats; ++k) to[a * Sums::kFloats + k] = sums[a].value(k);
  }
}

// ---- blocks ----

// A block of a one-pass kernel: its share [begin, end) of the items of a unit.
struct UnitBlock {
  int64_t sample;
  int64_t channel;  // the unit's first
  int rank;         // in the cluster
  int begin;
  int end;

  __device__ __forceinline__ UnitBlock(const GroupNormPlan& plan, int64_t block) {
    const int64_t row = block / plan.blocks_per_sample;
    const int rest = static_cast<int>(block - row * plan.blocks_per_sample);
    sample = row * plan.samples + threadIdx.y;
    rank = rest % plan.cluster;
    channel = int64_t{rest / plan.cluster} * plan.tiling.channels;
    begin = min(rank * plan.items_per_block, plan.tiling.items());
    end = min(begin + plan.items_per_block, plan.tiling.items());
  }
};

// A block of a split kernel: segments [first_segment, first_segment + segments) of the channels
// [channel, channel + channels), which are the items [begin, end).
struct ChunkBlock {
  int64_t sample;
  int chunk;
  int channel;
  int channels;
  int segment;
  int segments;
  int begin;
  int end;

  __device__ __forceinline__ ChunkBlock(const GroupNormPlan& plan, int64_t block) {
    const GroupNormTiling& tiling = plan.tiling;
    sample = block / plan.blocks_per_sample;
    const int rest = static_cast<int>(block - sample * plan.blocks_per_sample);
    // Neighbours in the grid read what is adjacent in memory.
    const int strips = static_cast<int>(plan.blocks_per_sample / plan.chunks);
    chunk = tiling.channels_last ? rest / strips : rest % plan.chunks;
    const int first =
        (tiling.channels_last ? rest % strips : rest / plan.chunks) * plan.chunk_blocks;
    const int blocks = min(plan.chunk_blocks, tiling.blocks - first);
    channel = first * tiling.block_channels;
    channels = min(blocks * tiling.block_channels, tiling.channels - channel);
    segment = chunk * plan.chunk_segments;
    segments = min(plan.chunk_segments, tiling.segments - segment);
    begin = first * tiling.segments + segment;
    end = begin + (blocks - 1) * tiling.segments + segments;
  }
};

// The groups that a chunk has channels of. What channels need of their groups is read once per
// group.
struct ChunkGroups {
  int group_channels;
  int channel;  // the chunk's first
  int first;
  int count;

  __device__ __forceinline__ ChunkGroups(const GroupNormLayout& layout, const ChunkBlock& block)
      : group_channels(static_cast<int>(layout.group_channels())),
        channel(block.channel),
        first(channel / group_channels),
        count((channel + block.channels - 1) / group_channels - first + 1) {}

  __device__ __forceinline__ int of(int c) const { return (channel + c) / group_channels - first; }
};

// Adds up what a chunk's items left in shared memory, to one partial sum per channel in the
// workspace: float k of channel c of chunk j of a sample is number ((sample chunks + j) floats + k)
// C + c.
template <typename Sums>
__device__ __forceinline__ void store_chunk(const GroupNormLayout& layout,
                                            const GroupNormPlan& plan, const ChunkBlock& block,
                                            const float* partials, float* workspace) {
  const int width = plan.tiling.block_channels;
  workspace += (block.sample * plan.chunks + block.chunk) * Sums::kFloats * layout.channels;
  merge_channels<Sums>(
      block.channels, block.segments,
      [&](int c, int i) {
        const float* from =
            partials + ((c / width * block.segments + i) * width + c % width) * Sums::kFloats;
        return Sums::from(plan.tiling.pixels_of(block.segment + i, layout.pixels),
                          [&](int k) { return from[k]; });
      },
      [&](int c, const Sums& sums) {
        for (int k = 0; k < Sums::kFloats; ++k) {
          workspace[k * layout.channels + block.channel + c] = sums.value(k);
        }
      });
}

// The partial sum of channel c of chunk j, as store_chunk left it.
template <typename Sums>
__device__ __forceinline__ Sums load_chunk(const GroupNormLayout& layout, const GroupNormPlan& plan,
                                           const float* workspace, int64_t sample, int64_t c,
                                           int j) {
  const int first = j * plan.chunk_segments;
  const int64_t begin = first * plan.tiling.segment_pixels;
  const int64_t size = plan.chunk_segments * plan.tiling.segment_pixels;
  const float n = static_cast<float>(min(size, layout.pixels - begin));
  workspace += (sample * plan.chunks + j) * Sums::kFloats * layout.channels + c;
  return Sums::from(n, [&](int k) { return workspace[k * layout.channels]; });
}

// The sum over all items of channel c of a unit, in every block of the cluster, through `store`.
template <typename Sums, typename Store>
__device__ __forceinline__ void merge_unit(const GroupNormLayout& layout, const GroupNormPlan& plan,
                                           const UnitBlock& block, const float* partials,
                                           const Store& store) {
  const GroupNormTiling& tiling = plan.tiling;
  const int width = tiling.block_channels;
  merge_channels<Sums>(
      tiling.channels, tiling.segments,
      [&](int c, int i) {
        const int item = c / width * tiling.segments + i;
        const int rank = item / plan.items_per_block;
        const float* from =
            partials + ((item - rank * plan.items_per_block) * width + c % width) * Sums::kFloats;
        return Sums::from(tiling.pixels_of(i, layout.pixels), [&](int k) {
          return rank == block.rank ? from[k] : load_from_cluster(from + k, rank);
        });
      },
      store);
}

}  // namespace fastdiff
