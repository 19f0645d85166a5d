#pragma once

#include "fastdiff/group_norm_silu_backward_items.cuh"

namespace fastdiff {

// One pass: copies x and grad once into shared memory, and writes dx from there.
template <typename T, bool ChannelsLast, int V, typename Drop, bool Residual>
__device__ __forceinline__ void one_pass_backward(const GroupNormSiluBackwardArgs& args,
                                                  const GroupNormPlan& plan, int64_t first_row) {
  extern __shared__ float4 shared_of_block[];
  float4* shared = shared_of_block + threadIdx.y * (plan.shared_bytes / 16);
  const GroupNormLayout& layout = args.layout;
  const UnitBlock block(plan, first_row);
  Items<ChannelsLast, V> items(layout, plan.tiling, block.begin(), block.end());
  const T* x = static_cast<const T*>(args.x) + block.offset(layout);
  const T* grad = static_cast<const T*>(args.grad) + block.offset(layout);
  T* data = reinterpret_cast<T*>(shared);
  const int distance = static_cast<int>(plan.items_per_block * plan.tiling.item_numel());
  float* floats = reinterpret_cast<float*>(shared + plan.data_bytes / 16);
  const GradientTable table = {floats};
  float* channels = floats + GradientTable::kCoefficients * plan.padded_channels;
  float* sum_totals = channels + GradientSums::kFloats * plan.padded_channels;
  auto* statistics =
      reinterpret_cast<GroupStatistics*>(sum_totals + Residual * plan.padded_channels);
  float* partials = reinterpret_cast<float*>(statistics + plan.groups);

  copy_items(items, {x, grad}, data, distance);
  // Under way meanwhile: statistics and operands.
  const int first_group = block.channel() / plan.group_channels;
  for (int g = threadIdx.x; g < plan.groups; g += blockDim.x) {
    statistics[g] = load_statistics<T>(args, block.sample(), first_group + g);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < plan.tiling.channels; c += blockDim.x) {
    table.set(c, load_operands<T>(args, block.sample(), block.channel() + c),
              statistics[c / plan.group_channels]);
  }
  wait_for_copies();
  __syncthreads();
  const OnChip<T, V> on_chip = {data}, grad_on_chip = {data + distance};
  const Drop dropout(args.dropout, layout, block.sample(), block.channel());
  with_gate(args.activation, [&](auto gate) {
    item_gradient_sums<T>(items, on_chip, grad_on_chip, table, 0, dropout, gate, partials);
  });
  __syncthreads();
  if (plan.cluster > 1) cluster_arrive(), cluster_wait();
  const UnitSums<GradientSums> sums = {layout, plan, block, partials, channels};
  sums.merge();

  for_groups(plan, [&](int g, int lane) {
    GradientSums group;
    for_channels(plan, g, lane, [&](int c, int part, bool has) {
      GradientSums of_channel;
      const int first = part;
      for (; has && part < plan.parts; part += 1 << plan.part_bits) {
        of_channel.merge(sums(c, part));
      }
      merge_lanes(of_channel, 1, 1 << plan.part_bits);
      if (!has || first > 0) return;
      const float rstd = table(c, kRstd), gamma = table(c, kGamma);
      of_channel.s1 *= rstd, of_channel.s2 *= rstd;
      for (int k = 0; k < GradientSums::kFloats; ++k) {
        channels[c * GradientSums::kFloats + k] = of_channel.value(k);
      }
      group.merge({gamma * of_channel.s0, gamma * of_channel.s1, 0.0f});
    });
    merge_lanes(group, 1, 1 << plan.group_bits);
    __syncwarp();
    if (g >= plan.groups) return;
    const float n = static_cast<float>(layout.pixels) * static_cast<float>(plan.group_channels);
    const float2 m = make_float2(group.s0 / n, group.s1 / n);
    const int first = g * plan.group_channels;
    for (int c = first + lane; c < first + plan.group_channels; c += 1 << plan.group_bits) {
      if (block.rank() == 0) {
        const int64_t channel = block.channel() + c;
        const float* of_channel = channels + c * GradientSums::kFloats;
        const GradientSums total = {of_channel[0], of_channel[1], of_channel[2]};
        store_modulation_gradients<T>(args, block.sample(), channel, total.s0, total.s1);
        store_channel_bias_gradient<T>(args, block.sample(), channel, table(c, kGamma),
                                       table(c, kRstd), total, m);
      }
      table.finish(c, m);
    }
  });
  if (plan.cluster > 1) cluster_leave();
  __syncthreads();
  if (block.rank() == 0 && threadIdx.y == 0) {
    for (int c = threadIdx.x; c < plan.tiling.channels; c += blockDim.x) {
      const char* from = reinterpret_cast<const char*>(channels + c * GradientSums::kFloats);
      float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 1
      for (int i = 0; i < plan.samples; ++i, from += plan.shared_bytes) {
        const float* sums_of = reinterpret_cast<const float*>(from);
        const float2 part = parameter_sums<T>(args, block.sample() + i, block.channel() + c,
                                              sums_of[0], sums_of[1]);
        total.x += part.x, total.y += part.y;
      }
      store_parameter_sums<T>(args, plan, block.sample() / plan.samples, block.channel() + c,
                              total);
    }
  }
  if (args.grad_x) {
    T* grad_x = static_cast<T*>(args.grad_x) + block.offset(layout);
    const auto write = [&](const auto& added) {
      with_gate(args.activation, [&](auto gate) {
        write_grad_x(grad_x, items, on_chip, grad_on_chip, table, 0, dropout, added, gate);
      });
    };
    if constexpr (Residual) {
      // Others of the cluster may still read the sums before.
      float* sum_partials =
          partials + GradientSums::kFloats * plan.items_per_block * plan.tiling.block_channels;
      const bool sums = args.grad_sum_bias.data;
      write(SumGradient<T, V>{args.grad_sum, block.offset(layout), sums ? sum_partials : nullptr});
      if (sums) {
        store_sum_gradient<T>(args, plan, block, sum_partials, sum_totals, plan.shared_bytes);
      }
    } else {
      write(NoSumGradient{});
    }
  }
  if (plan.cluster > 1) cluster_wait();
}

// Split, first reading of x and grad: the sums of every channel of every chunk.
template <typename T, bool ChannelsLast, int V, typename Drop>
__device__ __forceinline__ void split_sums(const GroupNormSiluBackwardArgs& args,
                                           const GroupNormPlan& plan, int64_t first_row) {
  extern __shared__ float4 shared[];
  const GradientTable table = {reinterpret_cast<float*>(shared)};
  float* partials =
      reinterpret_cast<float*>(shared) + GradientTable::kCoefficients * plan.padded_channels;
  auto* statistics =
      reinterpret_cast<GroupStatistics*>(partials);  // until the sums take this place
  const ChunkBlock block(plan, first_row);
  Items<ChannelsLast, V> items(args.layout, plan.tiling, block.begin(), block.end());
  const ChunkGroups groups(args.layout, block);
  const int64_t base = block.sample() * args.layout.channels * args.layout.pixels;
  for (int g = threadIdx.x; g < groups.count; g += blockDim.x) {
    statistics[g] = load_statistics<T>(args, block.sample(), groups.first + g);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < block.channels(); c += blockDim.x) {
    table.set(c, load_operands<T>(args, block.sample(), block.channel() + c),
              statistics[groups.of(c)]);
  }
  __syncthreads();
  const InMemory<T, V> x = {args.x, base}, grad = {args.grad, base};
  const Drop dropout(args.dropout, args.layout, block.sample(), 0);
  with_gate(args.activation, [&](auto gate) {
    item_gradient_sums<T>(items, x, grad, table, block.channel(), dropout, gate, partials);
  });
  __syncthreads();
  store_chunk<GradientSums>(args.layout, plan, block, partials,
                            GradientWorkspace(args.workspace, args.layout, plan).chunks);
}

// Split, between the readings: a block finishes the sums of one group. The sums of its channels are
// needed twice, before and after (m0, m1) is known, and wait in their places of the workspace.
template <typename T>
__global__ void __launch_bounds__(kGroupNormSplitThreads, 1)
    group_norm_silu_bwd_means_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                                     const int64_t first_block) {
  __shared__ GradientSums warps[kGroupNormSplitThreads / 32];
  __shared__ float2 shared_mean;
  const GroupNormLayout& layout = args.layout;
  const GradientWorkspace workspace(args.workspace, layout, plan);
  const int64_t group = first_block + blockIdx.x, sample = group / layout.groups;
  const int64_t size = layout.group_channels(), channel = group % layout.groups * size;
  // The sums of the first chunk give way to those of all.
  float* totals = workspace.chunks + sample * plan.chunks * 3 * layout.channels + channel;
  merge_channels<GradientSums>(
      static_cast<int>(size), plan.chunks,
      [&](int c, int j) {
        return load_chunk<GradientSums>(layout, plan, workspace.chunks, sample, channel + c, j);
      },
      [&](int c, const GradientSums& sums) {
        for (int k = 0; k < 3; ++k) totals[k * layout.channels + c] = sums.value(k);
      });
  const float rstd = __ldg(static_cast<const float*>(args.rstd) + group);
  __syncthreads();
  const auto gamma_of = [&](int64_t c) {
    return load_operand<T>(args.weight, sample, channel + c, 1.0f) *
           (1.0f + load_operand<T>(args.scale, sample, channel + c, 0.0f));
  };
  GradientSums sums;
  for (int64_t c = threadIdx.x; c < size; c += blockDim.x) {
    const float gamma = gamma_of(c);
    sums.merge({gamma * totals[c], gamma * totals[layout.channels + c], 0.0f});
  }
  merge_block(sums, warps);
  if (threadIdx.x == 0) {
    const float n = static_cast<float>(layout.group_numel());
    shared_mean = make_float2(sums.s0 / n, sums.s1 * rstd / n);
    reinterpret_cast<float2*>(workspace.means)[group] = shared_mean;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < size; c += blockDim.x) {
    const GradientSums total = {totals[c], totals[layout.channels + c] * rstd,
                                totals[2 * layout.channels + c] * rstd};
    store_modulation_gradients<T>(args, sample, channel + c, total.s0, total.s1);
    store_parameter_sums<T>(args, plan, sample, channel + c,
                            parameter_sums<T>(args, sample, channel + c, total.s0, total.s1));
    store_channel_bias_gradient<T>(args, sample, channel + c, gamma_of(c), rstd, total,
                                   shared_mean);
  }
}

// Split, second reading of x and grad.
template <typename T, bool ChannelsLast, int V, typename Drop, bool Residual>
__device__ __forceinline__ void split_write(const GroupNormSiluBackwardArgs& args,
                                            const GroupNormPlan& plan, int64_t first_row) {
  extern __shared__ float4 shared[];
  const GradientTable table = {reinterpret_cast<float*>(shared)};
  auto* statistics = reinterpret_cast<GroupStatistics*>(
      reinterpret_cast<float*>(shared) + GradientTable::kCoefficients * plan.padded_channels);
  auto* means = reinterpret_cast<float2*>(statistics + plan.padded_channels);
  const GroupNormLayout& layout = args.layout;
  const GradientWorkspace workspace(args.workspace, layout, plan);
  const ChunkBlock block(plan, first_row);
  Items<ChannelsLast, V> items(layout, plan.tiling, block.begin(), block.end());
  const int64_t base = block.sample() * layout.channels * layout.pixels;
  const ChunkGroups groups(layout, block);
  for (int g = threadIdx.x; g < groups.count; g += blockDim.x) {
    const int64_t group = block.sample() * layout.groups + groups.first + g;
    statistics[g] = load_statistics<T>(args, block.sample(), groups.first + g);
    means[g] = reinterpret_cast<const float2*>(workspace.means)[group];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < block.channels(); c += blockDim.x) {
    const int g = groups.of(c);
    table.set(c, load_operands<T>(args, block.sample(), block.channel() + c), statistics[g]);
    table.finish(c, means[g]);
  }
  __syncthreads();
  const InMemory<T, V> x = {args.x, base}, grad = {args.grad, base};
  const Drop dropout(args.dropout, layout, block.sample(), 0);
  const auto write = [&](const auto& added) {
    with_gate(args.activation, [&](auto gate) {
      write_grad_x(static_cast<T*>(args.grad_x) + base, items, x, grad, table, block.channel(),
                   dropout, added, gate);
    });
  };
  if constexpr (Residual) {
    float* partials = reinterpret_cast<float*>(means + plan.padded_channels);
    const bool sums = args.grad_sum_bias.data;
    write(SumGradient<T, V>{args.grad_sum, base, sums ? partials : nullptr});
    __syncthreads();
    if (sums) store_chunk<ChannelSum>(layout, plan, block, partials, workspace.sums);
  } else {
    write(NoSumGradient{});
  }
}

// ---- kernels ----

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_bwd_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                               const int64_t first_row) {
  one_pass_backward<T, ChannelsLast, V, NoDropout, false>(args, plan, first_row);
}

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_bwd_sums_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                                    const int64_t first_row) {
  split_sums<T, ChannelsLast, V, NoDropout>(args, plan, first_row);
}

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_bwd_apply_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                                     const int64_t first_row) {
  split_write<T, ChannelsLast, V, NoDropout, false>(args, plan, first_row);
}

// With dropout; the means are as without.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormWideBound, 1)
    group_norm_silu_dropout_bwd_kernel(const GroupNormSiluBackwardArgs args,
                                       const GroupNormPlan plan, const int64_t first_row) {
  one_pass_backward<T, ChannelsLast, V, SampleDropout, false>(args, plan, first_row);
}

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormWideBound, 1)
    group_norm_silu_dropout_bwd_sums_kernel(const GroupNormSiluBackwardArgs args,
                                            const GroupNormPlan plan, const int64_t first_row) {
  split_sums<T, ChannelsLast, V, SampleDropout>(args, plan, first_row);
}

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormWideBound, 1)
    group_norm_silu_dropout_bwd_apply_kernel(const GroupNormSiluBackwardArgs args,
                                             const GroupNormPlan plan, const int64_t first_row) {
  split_write<T, ChannelsLast, V, SampleDropout, false>(args, plan, first_row);
}

// Of a sum, whose own gradient is added; the sums for the norm are those of any x.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormWideBound, 1)
    group_norm_silu_residual_bwd_kernel(const GroupNormSiluBackwardArgs args,
                                        const GroupNormPlan plan, const int64_t first_row) {
  one_pass_backward<T, ChannelsLast, V, NoDropout, true>(args, plan, first_row);
}

template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormWideBound, 1)
    group_norm_silu_residual_bwd_apply_kernel(const GroupNormSiluBackwardArgs args,
                                              const GroupNormPlan plan, const int64_t first_row) {
  split_write<T, ChannelsLast, V, NoDropout, true>(args, plan, first_row);
}

}  // namespace fastdiff
