#pragma once

#include "fastdiff/group_norm_silu_blocks.cuh"
#include "fastdiff/group_norm_silu_dropout.cuh"
#include "fastdiff/group_norm_silu_sum.cuh"

namespace fastdiff {

// Sums of d = x - pivot and d^2 over the items, as the moments of each of their channels in
// `partials`. The pivot is a value of the item, so that rounding is relative to the spread of the
// values and not to their size: in channels_last the item's first pixel of the same channel, in the
// contiguous layout, whose items have more pixels, the mean of its lanes' first pixels. Were it
// farther off than most, by k standard deviations, the variance would lose k^2 units in the last
// place; of n values one is at most sqrt(n - 1) off.
template <typename T, bool ChannelsLast, int V, typename Source>
__device__ __forceinline__ void item_moments(Items<ChannelsLast, V>& items, const Source& source,
                                             float* partials) {
  using L = Lane<T, V>;
  using Float = typename L::Float;
  constexpr int A = ChannelsLast ? V : 1, S = ChannelsLast ? L::kFloats : 1;
  items.template walk<Source::kSumsWalk>([&](const Item& item) {
    auto vectors = source.vectors(items, item);
    const auto first = source.first(items, item);
    Float minus_pivot[S], sum[S], squares[S];
    float pivot = 0.0f;
    if constexpr (ChannelsLast) {
      if (items.inside(item)) {
        const auto pivots = vectors.at(first);
#pragma unroll
        for (int j = 0; j < S; ++j) minus_pivot[j] = L::widen(pivots, j);
      }
    } else {
      if (items.inside(item)) pivot = to_float(item.count ? vectors.element() : first[0]);
      pivot = items.lanes_mean(pivot);
      minus_pivot[0] = broadcast<Float>(pivot);
    }
#pragma unroll
    for (int j = 0; j < S; ++j) {
      minus_pivot[j] = negative(minus_pivot[j]);
      sum[j] = squares[j] = broadcast<Float>(0.0f);
    }
    in_steps<Source::template kSumVectors<ChannelsLast>>(item.count, [&](auto R) {
      Vector<T, V> loaded[R];
      vectors.load(loaded);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int j = 0; j < L::kFloats; ++j) {
          const int a = j % S;
          const Float d = add(L::widen(loaded[r], j), minus_pivot[a]);
          sum[a] = add(sum[a], d);
          squares[a] = multiply_add(d, d, squares[a]);
        }
      }
      vectors.skip(R);
    });
    float sums[2][A];
    L::split(sum, sums[0]);
    L::split(squares, sums[1]);
    const Share share = sum_lanes<ChannelsLast>(sums, items.tiling.lanes);
    if (!items.inside(item) || !share.own) return;
    const float inverse = fast_reciprocal(static_cast<float>(items.pixels(item)));
    float* to = partials + (items.place(item) + share.first) * Moments::kFloats;
#pragma unroll
    for (int a = 0; a < A; ++a) {
      if (a >= share.width) break;
      // Registers have no index, so that of one of several channels is read again.
      if (ChannelsLast) pivot = to_float(first[share.first + a]);
      const float mean = sums[0][a] * inverse;
      to[a * Moments::kFloats] = pivot + mean;
      to[a * Moments::kFloats + 1] = fmaxf(fmaf(-mean, sums[0][a], sums[1][a]), 0.0f);
    }
  });
}

// y = act(slope (x - center) + offset) on the items, with dropout or without; the coefficients of
// channel c are in place c - base.
template <typename T, bool ChannelsLast, int V, typename Source, typename Drop, typename Gate>
__device__ __forceinline__ void apply_affine(T* y, Items<ChannelsLast, V>& items,
                                             const Source& source, const AffineTable& table,
                                             int base, const Drop& dropout, Gate gate) {
  using L = Lane<T, V>;
  using Float = typename L::Float;
  items.template walk<1>([&](const Item& item) {
    if (item.count == 0) return;
    auto vectors = source.vectors(items, item);
    Float minus_center[L::kFloats], slope[L::kFloats], offset[L::kFloats];
    const int c = item.channel - base;
    L::template coefficients<ChannelsLast>(table, c, kMinusCenter, minus_center);
    L::template coefficients<ChannelsLast>(table, c, kSlope, slope);
    L::template coefficients<ChannelsLast>(table, c, kOffset, offset);
    T* to = y + items.offset(item);
    auto masks = dropout.masks(items, item);
    // Two masks at a time take more registers than there are, and hide no more latency.
    in_steps<Drop::kDrops && Source::kOnChip ? 1 : Source::kVectors>(item.count, [&](auto R) {
      Vector<T, V> loaded[R];
      vectors.load(loaded);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        Float values[L::kFloats];
#pragma unroll
        for (int j = 0; j < L::kFloats; ++j) {
          const Float d = add(L::widen(loaded[r], j), minus_center[j]);
          values[j] = dropout.scaled(gate.activate(multiply_add(d, slope[j], offset[j])));
        }
        L::store(to + r * items.tiling.step, masks.kept(r, L::narrow(values)));
      }
      vectors.skip(R), masks.skip(R);
      to += R * items.tiling.step;
    });
  });
}

__device__ __forceinline__ float reciprocal_deviation(float variance, double eps) {
  return 1.0f / sqrtf(variance + static_cast<float>(eps));
}

// One pass: copies x, or the sum, once into shared memory, and writes y from there. Items of a unit
// are divided among the blocks of a cluster, which read each other's partial sums.
template <typename T, bool ChannelsLast, int V, typename Drop, bool Residual>
__device__ __forceinline__ void one_pass_forward(const GroupNormSiluArgs& args,
                                                 const GroupNormPlan& plan, int64_t first_row) {
  extern __shared__ float4 shared[];
  const GroupNormLayout& layout = args.layout;
  const UnitBlock block(plan, first_row);
  Items<ChannelsLast, V> items(layout, plan.tiling, block.begin(), block.end());
  const T* x = static_cast<const T*>(args.x) + block.offset(layout);
  T* data = reinterpret_cast<T*>(shared);
  float* floats = reinterpret_cast<float*>(shared + plan.data_bytes / 16);
  const AffineTable table = {floats};
  float* channels = floats + AffineTable::kCoefficients * plan.padded_channels;
  float* partials = channels + Moments::kFloats * plan.padded_channels;

  if constexpr (!Residual) copy_items(items, {x}, data, 0);
  // Under way meanwhile: operands, which wait in the places of the coefficients.
  for (int c = threadIdx.x; c < plan.tiling.channels; c += blockDim.x) {
    const auto operands = load_operands<T>(args, block.sample(), block.channel() + c);
    table(c, kMinusCenter) = operands.added;
    table(c, kSlope) = operands.gamma;
    table(c, kOffset) = operands.beta;
  }
  if constexpr (Residual) {
    const SumBias bias = {channels};  // until the sums take this place
    load_sum_bias<T>(args, block.channel(), plan.tiling.channels, bias);
    __syncthreads();
    sum_items(items, SummedInMemory<T, V>{args, block.offset(layout), bias, 0}, data);
  }
  wait_for_copies();
  __syncwarp();  // a lane copied what it adds up, but not its item's pivot
  const OnChip<T, V> source = {data};
  item_moments<T>(items, source, partials);
  __syncthreads();
  if (plan.cluster > 1) cluster_arrive(), cluster_wait();
  const UnitSums<Moments> sums = {layout, plan, block, partials, channels};
  sums.merge();

  for_groups(plan, [&](int g, int lane) {
    const bool inside = g < plan.groups;
    const int first = inside ? g * plan.group_channels : 0;
    // Relative to a mean of the group's first channel.
    const float pivot = inside ? sums(first, 0).mean : 0.0f;
    const float first_added = inside ? table(first, kMinusCenter) : 0.0f;
    Moments group;
    for_channels(plan, g, lane, [&](int c, int part, bool has) {
      for (; has && part < plan.parts; part += 1 << plan.part_bits) {
        Moments of_part = sums(c, part);
        of_part.mean = of_part.mean - pivot + (table(c, kMinusCenter) - first_added);
        group.merge(of_part);
      }
    });
    merge_lanes(group, 1, 1 << plan.group_bits);
    const int leader = threadIdx.x % 32 - lane;
    const float mean = pivot + __shfl_sync(~0u, group.mean, leader);
    const float variance = __shfl_sync(~0u, group.m2 / group.n, leader);
    const float rstd = reciprocal_deviation(variance, args.eps);
    __syncwarp();
    if (!inside) return;
    if (lane == 0 && block.rank() == 0) {
      const int64_t to = block.sample() * layout.groups + block.channel() / plan.group_channels + g;
      static_cast<float*>(args.mean)[to] = mean + first_added;
      static_cast<float*>(args.rstd)[to] = rstd;
    }
    for (int c = first + lane; c < first + plan.group_channels; c += 1 << plan.group_bits) {
      table(c, kMinusCenter) = (table(c, kMinusCenter) - first_added) - mean;
      table(c, kSlope) *= rstd;
    }
  });
  if (plan.cluster > 1) cluster_leave();
  __syncthreads();

  const Drop dropout(args.dropout, layout, block.sample(), block.channel());
  with_gate(args.activation, [&](auto gate) {
    apply_affine(static_cast<T*>(args.y) + block.offset(layout), items, source, table, 0, dropout,
                 gate);
  });
  if (plan.cluster > 1) cluster_wait();
}

// Split, first reading of x, or of the summands: the moments of every channel of every chunk.
template <typename T, bool ChannelsLast, int V, bool Residual>
__device__ __forceinline__ void split_moments(const GroupNormSiluArgs& args,
                                              const GroupNormPlan& plan, int64_t first_row) {
  extern __shared__ float4 shared[];
  float* floats = reinterpret_cast<float*>(shared);
  float* partials = floats + Residual * plan.padded_channels;
  const ChunkBlock block(plan, first_row);
  Items<ChannelsLast, V> items(args.layout, plan.tiling, block.begin(), block.end());
  const int64_t base = block.sample() * args.layout.channels * args.layout.pixels;
  if constexpr (Residual) {
    const SumBias bias = {floats};
    load_sum_bias<T>(args, block.channel(), block.channels(), bias);
    __syncthreads();
    item_moments<T>(items, SummedInMemory<T, V>{args, base, bias, block.channel()}, partials);
  } else {
    item_moments<T>(items, InMemory<T, V>{args.x, base}, partials);
  }
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
    static_cast<float*>(args.rstd)[group] = reciprocal_deviation(sums.m2 / sums.n, args.eps);
    warps[0].mean = base;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < size; c += blockDim.x) {
    const float added = load_operand<T>(args.channel_bias, sample, channel + c, 0.0f);
    centers[c] = warps[0].mean - (added - first_added);
  }
}

// Split, second reading of x, or of the sum that the first one wrote.
template <typename T, bool ChannelsLast, int V, typename Drop>
__device__ __forceinline__ void split_apply(const GroupNormSiluArgs& args,
                                            const GroupNormPlan& plan, int64_t first_row) {
  extern __shared__ float4 shared[];
  const AffineTable table = {reinterpret_cast<float*>(shared)};
  const GroupNormLayout& layout = args.layout;
  const ChunkBlock block(plan, first_row);
  Items<ChannelsLast, V> items(layout, plan.tiling, block.begin(), block.end());
  const int64_t base = block.sample() * layout.channels * layout.pixels;
  const float* centers = split_centers(args, plan, block.sample()) + block.channel();
  const ChunkGroups groups(layout, block);
  const float* rstd =
      static_cast<float*>(args.rstd) + block.sample() * layout.groups + groups.first;
  for (int c = threadIdx.x; c < block.channels(); c += blockDim.x) {
    const auto operands = load_operands<T>(args, block.sample(), block.channel() + c);
    table(c, kMinusCenter) = -centers[c];
    table(c, kSlope) = operands.gamma * rstd[groups.of(c)];
    table(c, kOffset) = operands.beta;
  }
  __syncthreads();
  const Drop dropout(args.dropout, layout, block.sample(), 0);
  with_gate(args.activation, [&](auto gate) {
    apply_affine(static_cast<T*>(args.y) + base, items, InMemory<T, V>{args.x, base}, table,
                 block.channel(), dropout, gate);
  });
}

// ---- kernels ----

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_fwd_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                               const int64_t first_row) {
  one_pass_forward<T, ChannelsLast, V, NoDropout, false>(args, plan, first_row);
}

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_moments_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                                   const int64_t first_row) {
  split_moments<T, ChannelsLast, V, false>(args, plan, first_row);
}

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_apply_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                                 const int64_t first_row) {
  split_apply<T, ChannelsLast, V, NoDropout>(args, plan, first_row);
}

// With dropout; the moments are as without.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_dropout_fwd_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                                       const int64_t first_row) {
  one_pass_forward<T, ChannelsLast, V, SampleDropout, false>(args, plan, first_row);
}

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormWideBound, 1)
    group_norm_silu_dropout_apply_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                                         const int64_t first_row) {
  split_apply<T, ChannelsLast, V, SampleDropout>(args, plan, first_row);
}

// Of a sum; after its moments it is applied as any x.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_residual_fwd_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                                        const int64_t first_row) {
  one_pass_forward<T, ChannelsLast, V, NoDropout, true>(args, plan, first_row);
}

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormWideBound, 1)
    group_norm_silu_residual_moments_kernel(const GroupNormSiluArgs args, const GroupNormPlan plan,
                                            const int64_t first_row) {
  split_moments<T, ChannelsLast, V, true>(args, plan, first_row);
}

}  // namespace fastdiff
