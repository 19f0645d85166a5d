#pragma once

#include "fastdiff/group_norm_silu_gradients.cuh"

namespace fastdiff {

// Of a group: base and rstd, and the bias of its first channel, which the base is relative to
// (fastdiff/group_norm_silu.h).
struct GroupStatistics {
  float base, rstd, first_added;
};

// The mean was rounded with the first channel's bias in it. Any value that rounds to it may be the
// base; where the group's first element does, it is the one that is exact in constant groups.
template <typename T>
__device__ __forceinline__ GroupStatistics load_statistics(const GroupNormSiluBackwardArgs& args,
                                                           int64_t sample, int group) {
  const GroupNormLayout& layout = args.layout;
  const int64_t i = sample * layout.groups + group;
  GroupStatistics s = {__ldg(static_cast<const float*>(args.mean) + i),
                       __ldg(static_cast<const float*>(args.rstd) + i), 0.0f};
  if (!args.channel_bias.data) return s;
  const int64_t channel = group * layout.group_channels();
  const int64_t element = sample * layout.channels * layout.pixels +
                          channel * (layout.channels_last ? 1 : layout.pixels);
  const float first = to_float(__ldg(static_cast<const T*>(args.x) + element));
  s.first_added = load_operand<T>(args.channel_bias, sample, channel, 0.0f);
  s.base = first + s.first_added == s.base ? first : s.base - s.first_added;
  return s;
}

// dz is needed twice, for the sums and for dx, and made from x and grad both times:
//   d = x - center,  z = slope d + offset,  dz = grad act'(z),  h_hat = rstd d,
//   dx = slope dz - rstd (m0 + h_hat m1) = slope dz + (linear d + constant).
// The sums are first of d in place of h_hat.
struct GradientTable : ChannelTable<5> {
  __device__ __forceinline__ void set(int c, const ChannelOperands& operands,
                                      const GroupStatistics& group) const {
    const auto& table = *this;
    table(c, kMinusCenter) = (operands.added - group.first_added) - group.base;
    table(c, kSlope) = group.rstd * operands.gamma;
    table(c, kOffset) = operands.beta;
    table(c, kRstd) = group.rstd;
    table(c, kGamma) = operands.gamma;
  }
  // m: (m0, m1)
  __device__ __forceinline__ void finish(int c, float2 m) const {
    const float rstd = (*this)(c, kRstd);
    (*this)(c, kLinear) = -(rstd * rstd * m.y);
    (*this)(c, kConstant) = -(rstd * m.x);
  }
};

// x - center and z of V channels, or of one.
template <typename T, bool ChannelsLast, int V>
struct Centered {
  using L = Lane<T, V>;
  using Float = typename L::Float;
  Float minus_center[L::kFloats], slope[L::kFloats], offset[L::kFloats];

  __device__ __forceinline__ Centered(const GradientTable& table, int c) {
    L::template coefficients<ChannelsLast>(table, c, kMinusCenter, minus_center);
    L::template coefficients<ChannelsLast>(table, c, kSlope, slope);
    L::template coefficients<ChannelsLast>(table, c, kOffset, offset);
  }
  __device__ __forceinline__ Float d(int j, Float x) const { return add(x, minus_center[j]); }
  __device__ __forceinline__ Float z(int j, Float d) const {
    return multiply_add(d, slope[j], offset[j]);
  }
};

// Sums of dz, dz d and d over the items, one per channel of an item, in `partials`; the
// coefficients of channel c are in place c - base.
template <typename T, bool ChannelsLast, int V, typename Source, typename Gate>
__device__ __forceinline__ void item_gradient_sums(Items<ChannelsLast, V>& items, const Source& x,
                                                   const Source& grad, const GradientTable& table,
                                                   int base, Gate gate, float* partials) {
  using L = Lane<T, V>;
  using Float = typename L::Float;
  constexpr int A = ChannelsLast ? V : 1, S = ChannelsLast ? L::kFloats : 1;
  items.template walk<Source::kSumsWalk>([&](const Item& item) {
    auto x_vectors = x.vectors(items, item), grad_vectors = grad.vectors(items, item);
    Float s0[S], s1[S], s2[S];
#pragma unroll
    for (int j = 0; j < S; ++j) s0[j] = s1[j] = s2[j] = broadcast<Float>(0.0f);
    in_steps<Source::kSumPairs>(item.count, [&](auto R) {
      Vector<T, V> xs[R], grads[R];
#pragma unroll
      for (int r = 0; r < R; ++r) xs[r] = x_vectors[r], grads[r] = grad_vectors[r];
      const Centered<T, ChannelsLast, V> centered(table, item.channel - base);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int j = 0; j < L::kFloats; ++j) {
          const int a = j % S;
          const Float d = centered.d(j, L::widen(xs[r], j));
          const Float dz = gate.gradient(L::widen(grads[r], j), centered.z(j, d));
          s0[a] = add(s0[a], dz);
          s1[a] = multiply_add(dz, d, s1[a]);
          s2[a] = add(s2[a], d);
        }
      }
      x_vectors.skip(R), grad_vectors.skip(R);
    });
    float sums[GradientSums::kFloats][A];
    L::split(s0, sums[0]);
    L::split(s1, sums[1]);
    L::split(s2, sums[2]);
    const Share share = sum_lanes<ChannelsLast>(sums, items.tiling.lanes);
    if (!items.inside(item) || !share.own) return;
    float* to = partials + (items.place(item) + share.first) * GradientSums::kFloats;
#pragma unroll
    for (int a = 0; a < A; ++a) {
      if (a >= share.width) break;
#pragma unroll
      for (int k = 0; k < GradientSums::kFloats; ++k) {
        to[a * GradientSums::kFloats + k] = sums[k][a];
      }
    }
  });
}

// dx on the items.
template <typename T, bool ChannelsLast, int V, typename Source, typename Gate>
__device__ __forceinline__ void write_grad_x(T* grad_x, Items<ChannelsLast, V>& items,
                                             const Source& x, const Source& grad,
                                             const GradientTable& table, int base, Gate gate) {
  using L = Lane<T, V>;
  using P = Lane<T, (V < 4 ? V : 4)>;
  using Float = typename L::Float;
  items.template walk<1>([&](const Item& item) {
    if (item.count == 0) return;
    auto x_vectors = x.vectors(items, item), grad_vectors = grad.vectors(items, item);
    T* to = grad_x + items.offset(item);
    in_steps<Source::kVectors>(item.count, [&](auto R) {
      Vector<T, V> xs[R], grads[R];
#pragma unroll
      for (int r = 0; r < R; ++r) xs[r] = x_vectors[r], grads[r] = grad_vectors[r];
      Float values[R][L::kFloats];
      // Four channels after each other: coefficients of eight would not leave enough registers.
#pragma unroll
      for (int part = 0; part < L::kFloats; part += P::kFloats) {
        const int c = item.channel - base + (ChannelsLast ? part * V / L::kFloats : 0);
        const Centered<T, ChannelsLast, P::kElements> centered(table, c);
        Float linear[P::kFloats], constant[P::kFloats];
        P::template coefficients<ChannelsLast>(table, c, kLinear, linear);
        P::template coefficients<ChannelsLast>(table, c, kConstant, constant);
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int j = 0; j < P::kFloats; ++j) {
            const Float d = centered.d(j, L::widen(xs[r], part + j));
            const Float dz = gate.gradient(L::widen(grads[r], part + j), centered.z(j, d));
            values[r][part + j] =
                multiply_add(centered.slope[j], dz, multiply_add(d, linear[j], constant[j]));
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) L::store(to + r * items.tiling.step, L::narrow(values[r]));
      x_vectors.skip(R), grad_vectors.skip(R);
      to += R * items.tiling.step;
    });
  });
}

// One pass: copies x and grad once into shared memory, and writes dx from there.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_bwd_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                               const int64_t first_row) {
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
  auto* statistics =
      reinterpret_cast<GroupStatistics*>(channels + GradientSums::kFloats * plan.padded_channels);
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
  with_gate(args.activation, [&](auto gate) {
    item_gradient_sums<T>(items, on_chip, grad_on_chip, table, 0, gate, partials);
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
    with_gate(args.activation, [&](auto gate) {
      write_grad_x(static_cast<T*>(args.grad_x) + block.offset(layout), items, on_chip,
                   grad_on_chip, table, 0, gate);
    });
  }
  if (plan.cluster > 1) cluster_wait();
}

// Split, first reading of x and grad: the sums of every channel of every chunk.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_bwd_sums_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                                    const int64_t first_row) {
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
  with_gate(args.activation, [&](auto gate) {
    item_gradient_sums<T>(items, x, grad, table, block.channel(), gate, partials);
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
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormBound, 1)
    group_norm_silu_bwd_apply_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                                     const int64_t first_row) {
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
  with_gate(args.activation, [&](auto gate) {
    write_grad_x(static_cast<T*>(args.grad_x) + base, items, x, grad, table, block.channel(), gate);
  });
}

}  // namespace fastdiff
