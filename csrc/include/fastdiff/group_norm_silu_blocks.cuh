#pragma once

// What the blocks of group_norm_silu's kernels have in common: small operands, sums in a fixed
// order, and which part of the work a block has.

#include "fastdiff/cluster.cuh"
#include "fastdiff/group_norm_silu_items.cuh"

namespace fastdiff {

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

// gamma = weight (1 + scale), beta = bias (1 + scale) + shift, and channel_bias, of one channel of
// one sample.
struct ChannelOperands {
  float gamma, beta, added;
};
template <typename T, typename Args>
__device__ __forceinline__ ChannelOperands load_operands(const Args& args, int64_t sample,
                                                         int64_t channel) {
  const auto map = channel_affine(1.0f, load_operand<T>(args.weight, sample, channel, 1.0f),
                                  load_operand<T>(args.bias, sample, channel, 0.0f),
                                  load_operand<T>(args.scale, sample, channel, 0.0f),
                                  load_operand<T>(args.shift, sample, channel, 0.0f));
  return {map.slope, map.offset, load_operand<T>(args.channel_bias, sample, channel, 0.0f)};
}

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
  for (int offset = high >> 1; offset >= low; offset >>= 1) sums.merge(sums.other_lane(offset));
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

// ---- blocks ----

// A block of a one-pass kernel: its unit, and its share [begin, end) of the unit's items. Most is
// made when needed, as registers are few.
struct UnitBlock {
  const GroupNormPlan& plan;
  const int64_t first_row;  // of the launch, in rows of plan.blocks_per_sample blocks
  unsigned row, in_row;

  __device__ __forceinline__ UnitBlock(const GroupNormPlan& of_launch, int64_t first)
      : plan(of_launch), first_row(first) {
    const unsigned per_row = static_cast<unsigned>(plan.blocks_per_sample);
    row = blockIdx.x / per_row;
    in_row = blockIdx.x - row * per_row;
  }

  // Of this thread.
  __device__ __forceinline__ int64_t sample() const {
    return (first_row + row) * plan.samples + threadIdx.y;
  }
  // In the cluster.
  __device__ __forceinline__ int rank() const {
    return static_cast<int>(in_row & (plan.cluster - 1));
  }
  // The unit's first.
  __device__ __forceinline__ int channel() const {
    return static_cast<int>(in_row >> plan.cluster_bits) * plan.tiling.channels;
  }
  // The first element of the unit in a tensor.
  __device__ __forceinline__ int64_t offset(const GroupNormLayout& layout) const {
    return sample() * layout.channels * layout.pixels +
           channel() * (layout.channels_last ? 1 : layout.pixels);
  }
  __device__ __forceinline__ int begin() const {
    return min(rank() * plan.items_per_block, plan.tiling.items());
  }
  __device__ __forceinline__ int end() const {
    return min(begin() + plan.items_per_block, plan.tiling.items());
  }
};

// The sums of channel c of a unit, in plan.parts parts: of its items, in the blocks of the cluster
// that had them; or, where these are many, one sum, which merge() leaves in `channels`.
template <typename Sums>
struct UnitSums {
  const GroupNormLayout& layout;
  const GroupNormPlan& plan;
  const UnitBlock& block;
  const float* partials;
  float* channels;

  __device__ __forceinline__ void merge() const {
    if (plan.parts == plan.tiling.segments) return;
    merge_channels<Sums>(
        plan.tiling.channels, plan.tiling.segments, [&](int c, int i) { return of_item(c, i); },
        [&](int c, const Sums& sums) {
          for (int k = 0; k < Sums::kFloats; ++k) channels[c * Sums::kFloats + k] = sums.value(k);
        });
    __syncthreads();
  }

  __device__ __forceinline__ Sums operator()(int c, int part) const {
    if (plan.parts == plan.tiling.segments) return of_item(c, part);
    return Sums::from(static_cast<float>(layout.pixels),
                      [&](int k) { return channels[c * Sums::kFloats + k]; });
  }

 private:
  __device__ __forceinline__ Sums of_item(int c, int segment) const {
    const GroupNormTiling& tiling = plan.tiling;
    const int width = tiling.block_channels;
    const int strip = tiling.blocks == 1 ? 0 : width == 1 ? c : c / width;
    const int item = strip * tiling.segments + segment;
    const int rank = plan.cluster == 1 ? 0 : item / plan.items_per_block;
    const int place = (item - rank * plan.items_per_block) * width;
    const float* from = partials + (place + c - strip * width) * Sums::kFloats;
    const float n = static_cast<float>(tiling.pixels_of(segment, layout.pixels));
    return Sums::from(n, [&](int k) {
      return rank == block.rank() ? from[k] : load_from_cluster(from + k, rank);
    });
  }
};

// The groups of a unit are finished by teams of lanes: every lane calls body(g, lane of the team),
// with g = plan.groups or more if there is no group left for its team.
template <typename Body>
__device__ __forceinline__ void for_groups(const GroupNormPlan& plan, const Body& body) {
  const int lane = threadIdx.x % 32, teams = 32 >> plan.group_bits;
  const int step = static_cast<int>(blockDim.x / 32) * teams;
#pragma unroll 1
  for (int first = threadIdx.x / 32 * teams; first < plan.groups; first += step) {
    body(first + (lane >> plan.group_bits), lane & ((1 << plan.group_bits) - 1));
  }
}

// In a team, 2^part_bits lanes have the parts of a channel: every lane calls body(channel, first
// part, whether there is such a channel).
template <typename Body>
__device__ __forceinline__ void for_channels(const GroupNormPlan& plan, int g, int lane,
                                             const Body& body) {
  const int side = lane >> plan.part_bits, part = lane & ((1 << plan.part_bits) - 1);
  const int step = 1 << (plan.group_bits - plan.part_bits);
#pragma unroll 1
  for (int first = 0; first < plan.group_channels; first += step) {
    const int k = first + side;
    body(g * plan.group_channels + k, part, g < plan.groups && k < plan.group_channels);
  }
}

// A block of a split kernel: segments [segment, segment + segments) of the channels [channel,
// channel
// + channels), which are the items [begin, end).
struct ChunkBlock {
  const GroupNormPlan& plan;
  const int64_t first_row;  // of the launch, in rows of plan.blocks_per_sample blocks
  unsigned row;
  int chunk, first_block;

  __device__ __forceinline__ ChunkBlock(const GroupNormPlan& of_launch, int64_t first)
      : plan(of_launch), first_row(first) {
    const unsigned per_row = static_cast<unsigned>(plan.blocks_per_sample);
    row = blockIdx.x / per_row;
    const int in_row = static_cast<int>(blockIdx.x - row * per_row);
    // Neighbours in the grid read what is adjacent in memory.
    const int strips = static_cast<int>(per_row) / plan.chunks;
    chunk = plan.tiling.channels_last ? in_row / strips : in_row % plan.chunks;
    const int strip = plan.tiling.channels_last ? in_row % strips : in_row / plan.chunks;
    first_block = strip * plan.chunk_blocks;
  }

  __device__ __forceinline__ int64_t sample() const { return first_row + row; }
  __device__ __forceinline__ int channel() const {
    return first_block * plan.tiling.block_channels;
  }
  __device__ __forceinline__ int channels() const {
    return min(blocks() * plan.tiling.block_channels, plan.tiling.channels - channel());
  }
  __device__ __forceinline__ int segment() const { return chunk * plan.chunk_segments; }
  __device__ __forceinline__ int segments() const {
    return min(plan.chunk_segments, plan.tiling.segments - segment());
  }
  __device__ __forceinline__ int begin() const {
    return first_block * plan.tiling.segments + segment();
  }
  __device__ __forceinline__ int end() const {
    return begin() + (blocks() - 1) * plan.tiling.segments + segments();
  }

 private:
  __device__ __forceinline__ int blocks() const {
    return min(plan.chunk_blocks, plan.tiling.blocks - first_block);
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
        channel(block.channel()),
        first(channel / group_channels),
        count((channel + block.channels() - 1) / group_channels - first + 1) {}

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
  workspace += (block.sample() * plan.chunks + block.chunk) * Sums::kFloats * layout.channels;
  merge_channels<Sums>(
      block.channels(), block.segments(),
      [&](int c, int i) {
        const float* from =
            partials + ((c / width * block.segments() + i) * width + c % width) * Sums::kFloats;
        return Sums::from(plan.tiling.pixels_of(block.segment() + i, layout.pixels),
                          [&](int k) { return from[k]; });
      },
      [&](int c, const Sums& sums) {
        for (int k = 0; k < Sums::kFloats; ++k) {
          workspace[k * layout.channels + block.channel() + c] = sums.value(k);
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

}  // namespace fastdiff
