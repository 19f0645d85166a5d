#pragma once

#include "fastdiff/group_norm_silu_items.cuh"

namespace fastdiff {

constexpr int kGroupNormBatch = 4;  // vectors that a lane loads at a time

// Moments of what one lane reads, of A sums side by side: element e of a batch goes to sum e % A.
// Deviations are taken from the lane's first element, so that rounding is relative to the spread of
// the values and not to their size, and batches are merged, which is right wherever that element
// lies.
template <int A>
struct LaneMoments {
  float n = 0.0f;  // per sum
  float pivot[A], mean[A], m2[A];

  template <int N>
  __device__ __forceinline__ void add(float (&x)[N]) {
    constexpr float count = static_cast<float>(N / A);
    if (n == 0.0f) {
#pragma unroll
      for (int a = 0; a < A; ++a) pivot[a] = x[a], mean[a] = m2[a] = 0.0f;
    }
    n += count;
    const float weight = __fdividef(count, n);
#pragma unroll
    for (int a = 0; a < A; ++a) {
      float sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int e = a; e < N; e += A) sum += x[e] -= pivot[a];
      const float batch_mean = sum * (1.0f / count);
#pragma unroll
      for (int e = a; e < N; e += A) squares += (x[e] - batch_mean) * (x[e] - batch_mean);
      const float delta = batch_mean - mean[a];
      mean[a] += delta * weight;
      m2[a] += squares + delta * delta * ((n - count) * weight);
    }
  }

  __device__ __forceinline__ void get(Moments (&sums)[A]) const {
#pragma unroll
    for (int a = 0; a < A; ++a) {
      if (n > 0.0f) sums[a] = {n, pivot[a] + mean[a], m2[a]};
    }
  }
};

// Reads the items [begin, end) and leaves the moments of each of their channels in `partials`;
// keep(k, item, vector) is called for every vector.
template <typename T, bool ChannelsLast, int V, typename Keep>
__device__ __forceinline__ void item_moments(const T* x, const GroupNormLayout& layout,
                                             const GroupNormTiling& tiling, int64_t channel,
                                             int begin, int end, float* partials,
                                             const Keep& keep) {
  constexpr int A = ChannelsLast ? V : 1;
  for_items<ChannelsLast, V>(layout, tiling, channel, begin, end, [&](const LaneItem& item) {
    LaneMoments<A> moments;
    for_batches<kGroupNormBatch>(
        item.count, [&](int k) { return load_global<T, V>(x + item.offset + k * item.stride); },
        [&](int k, auto& vectors) {
          constexpr int R = sizeof(vectors) / sizeof(vectors[0]);
          float values[R * V];
#pragma unroll
          for (int r = 0; r < R; ++r) {
            keep(k + r, item, vectors[r]);
#pragma unroll
            for (int v = 0; v < V; ++v) values[r * V + v] = to_float(vectors[r].values[v]);
          }
          moments.add(values);
        });
    Moments sums[A];
    moments.get(sums);
    store_item<ChannelsLast, V>(tiling, item, begin, sums, partials);
  });
}

// y = act(slope (x - center) + offset) on the items [begin, end), with the vectors from load(k,
// item), (slope, offset) in affine[c] and the center in centers[c].x, c counted from `base`, the
// first channel that both have.
template <typename T, bool ChannelsLast, int V, typename Load>
__device__ __forceinline__ void apply_affine(T* y, const GroupNormLayout& layout,
                                             const GroupNormTiling& tiling, int64_t channel,
                                             int begin, int end, const float2* affine,
                                             const float2* centers, int base, const Gate gate,
                                             const Load& load) {
  constexpr int A = ChannelsLast ? V : 1;
  for_items<ChannelsLast, V>(layout, tiling, channel, begin, end, [&](const LaneItem& item) {
    if (item.count == 0) return;
    float2 map[A];
#pragma unroll
    for (int a = 0; a < A; ++a) map[a] = affine[item.channel - base + a];
    const auto get_centers = [&](float (&to)[A]) {
#pragma unroll
      for (int a = 0; a < A; ++a) to[a] = centers[item.channel - base + a].x;
    };
    // Those of eight channels are read again for every batch, to have the registers.
    constexpr bool kHeld = A < 8;
    float held[A];
    if constexpr (kHeld) get_centers(held);
    for_batches<kGroupNormBatch>(
        item.count, [&](int k) { return load(k, item); },
        [&](int k, auto& vectors) {
          constexpr int R = sizeof(vectors) / sizeof(vectors[0]);
          float center[A];
          if constexpr (kHeld) {
#pragma unroll
            for (int a = 0; a < A; ++a) center[a] = held[a];
          } else {
            get_centers(center);
          }
#pragma unroll
          for (int r = 0; r < R; ++r) {
            float values[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const float2 m = map[v % A];
              const float d = to_float(vectors[r].values[v]) - center[v % A];
              values[v] = gate.activate(m.x * d + m.y);
            }
            store_global(y + item.offset + (k + r) * item.stride, values);
          }
        });
  });
}

__device__ __forceinline__ float reciprocal_deviation(const Moments& group, double eps) {
  return 1.0f / sqrtf(group.m2 / group.n + static_cast<float>(eps));
}

// One pass: reads x once into shared memory, and writes y from there. Items of a unit are divided
// among the blocks of a cluster, which read each other's partial sums.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormThreads, 1)
    group_norm_silu_fwd_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                               const int64_t first_block) {
  extern __shared__ float4 shared[];
  const GroupNormLayout& layout = args.layout;
  const GroupNormTiling& tiling = plan.tiling;
  const UnitBlock block(plan, first_block + blockIdx.x);
  const int64_t base = block.sample * layout.channels * layout.pixels;
  const int group_channels = static_cast<int>(layout.group_channels());
  const int groups = tiling.channels / group_channels;
  const int64_t first_group = block.sample * layout.groups + block.channel / group_channels;

  const int64_t data_bytes = plan.items_per_block * tiling.item_numel() * int64_t{sizeof(T)};
  T* data = reinterpret_cast<T*>(shared);
  float2* channels = reinterpret_cast<float2*>(shared + (data_bytes + 15) / 16);
  float2* affine = channels + tiling.channels;
  float2* statistics = affine + tiling.channels;  // base and rstd of a group
  float* partials = reinterpret_cast<float*>(statistics + groups);

  item_moments<T, ChannelsLast, V>(
      static_cast<const T*>(args.x) + base, layout, tiling, block.channel, block.begin, block.end,
      partials, [&](int k, const LaneItem& item, const Vector<T, V>& vector) {
        store_shared(data + (item.slot + k * item.slot_stride) * V, vector);
      });
  __syncthreads();
  if (plan.cluster > 1) cluster_arrive(), cluster_wait();
  merge_unit<Moments>(layout, plan, block, partials, [&](int c, const Moments& sums) {
    channels[c] = make_float2(sums.mean, sums.m2);
    // Until the map takes this place.
    affine[c].x = load_operand<T>(args.channel_bias, block.sample, block.channel + c, 0.0f);
  });
  if (plan.cluster > 1) cluster_arrive();  // the others' shared memory is not read any more
  __syncthreads();

  for (int g = threadIdx.x / 32; g < groups; g += blockDim.x / 32) {
    Moments group;  // relative to the group's first channel
    const int first = g * group_channels;
    const float pivot = channels[first].x, first_added = affine[first].x;
    __syncwarp();
    for (int c = first + threadIdx.x % 32; c < first + group_channels; c += 32) {
      const float2 m = channels[c];
      const float added = affine[c].x - first_added;
      affine[c].x = added;
      group.merge({static_cast<float>(layout.pixels), m.x - pivot + added, m.y});
    }
    merge_lanes(group, 1, 32);
    if (threadIdx.x % 32) continue;
    const float rstd = reciprocal_deviation(group, args.eps), mean = pivot + group.mean;
    statistics[g] = make_float2(mean, rstd);
    if (block.rank == 0) {
      static_cast<float*>(args.mean)[first_group + g] = mean + first_added;
      static_cast<float*>(args.rstd)[first_group + g] = rstd;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < tiling.channels; c += blockDim.x) {
    const float2 s = statistics[c / group_channels];
    const auto map = load_affine<T>(args, block.sample, block.channel + c, s.y);
    channels[c].x = s.x - affine[c].x;
    affine[c] = make_float2(map.slope, map.offset);
  }
  __syncthreads();

  apply_affine<T, ChannelsLast, V>(
      static_cast<T*>(args.y) + base, layout, tiling, block.channel, block.begin, block.end, affine,
      channels, 0, Gate(args.activation), [&](int k, const LaneItem& item) {
        return load_shared<T, V>(data + (item.slot + k * item.slot_stride) * V);
      });
  if (plan.cluster > 1) cluster_wait();
}

// Split, first reading of x: the moments of every channel of every chunk.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormSplitThreads, 1)
    group_norm_silu_moments_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                                   const int64_t first_block) {
  extern __shared__ float4 shared[];
  float* partials = reinterpret_cast<float*>(shared);
  const ChunkBlock block(plan, first_block + blockIdx.x);
  const T* x =
      static_cast<const T*>(args.x) + block.sample * args.layout.channels * args.layout.pixels;
  item_moments<T, ChannelsLast, V>(x, args.layout, plan.tiling, 0, block.begin, block.end, partials,
                                   [](int, const LaneItem&, const Vector<T, V>&) {});
  __syncthreads();
  store_chunk<Moments>(args.layout, plan, block, partials, static_cast<float*>(args.workspace));
}

// Split: where the statistics kernel leaves the center of a sample's channel 0, before those of the
// others. The moments of the first chunk give way to it.
__device__ __forceinline__ float* split_centers(const GroupNormSiluArgs& args,
                                                const GroupNormPlan& plan, int64_t sample) {
  return static_cast<float*>(args.workspace) +
         sample * plan.chunks * Moments::kFloats * args.layout.channels;
}

// Split, between the readings: a block merges the moments of one group, relative to its first
// channel.
template <typename T>
__global__ void __launch_bounds__(kGroupNormSplitThreads, 1)
    group_norm_silu_statistics_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                                      const int64_t first_block) {
  __shared__ Moments warps[kGroupNormSplitThreads / 32];
  const GroupNormLayout& layout = args.layout;
  const int64_t group = first_block + blockIdx.x;
  const int64_t sample = group / layout.groups, size = layout.group_channels();
  const int64_t channel = group % layout.groups * size;
  float* centers = split_centers(args, plan, sample) + channel;
  const float pivot = centers[0];  // still the mean of the first channel's first chunk
  const float first_added = load_operand<T>(args.channel_bias, sample, channel, 0.0f);
  Moments sums;
  for (int64_t i = threadIdx.x; i < size * plan.chunks; i += blockDim.x) {
    const int64_t c = channel + i % size;
    Moments part = load_chunk<Moments>(layout, plan, static_cast<const float*>(args.workspace),
                                       sample, c, static_cast<int>(i / size));
    part.mean -= pivot;
    part.mean += load_operand<T>(args.channel_bias, sample, c, 0.0f) - first_added;
    sums.merge(part);
  }
  merge_block(sums, warps);
  if (threadIdx.x == 0) {
    const float base = pivot + sums.mean;
    static_cast<float*>(args.mean)[group] = base + first_added;
    static_cast<float*>(args.rstd)[group] = reciprocal_deviation(sums, args.eps);
    warps[0].mean = base;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < size; c += blockDim.x) {
    const float added = load_operand<T>(args.channel_bias, sample, channel + c, 0.0f);
    centers[c] = warps[0].mean - (added - first_added);
  }
}

// Split, second reading of x.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormSplitThreads, 1)
    group_norm_silu_apply_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                                 const int64_t first_block) {
  extern __shared__ float4 shared[];
  float2* affine = reinterpret_cast<float2*>(shared);
  float2* centers = affine + plan.chunk_channels();
  const GroupNormLayout& layout = args.layout;
  const ChunkBlock block(plan, first_block + blockIdx.x);
  const int64_t base = block.sample * layout.channels * layout.pixels;
  for (int i = threadIdx.x; i < block.channels; i += blockDim.x) {
    const int64_t c = block.channel + i;
    const int64_t group = block.sample * layout.groups + c / layout.group_channels();
    const auto map = load_affine<T>(args, block.sample, c, static_cast<float*>(args.rstd)[group]);
    affine[i] = make_float2(map.slope, map.offset);
    centers[i].x = split_centers(args, plan, block.sample)[c];
  }
  __syncthreads();
  const T* x = static_cast<const T*>(args.x) + base;
  apply_affine<T, ChannelsLast, V>(static_cast<T*>(args.y) + base, layout, plan.tiling, 0,
                                   block.begin, block.end, affine, centers, block.channel,
                                   Gate(args.activation), [&](int k, const LaneItem& item) {
                                     return load_global<T, V>(x + item.offset + k * item.stride);
                                   });
}

}  // namespace fastdiff
