#pragma once

#include "fastdiff/group_norm_silu_items.cuh"

namespace fastdiff {

constexpr int kGroupNormPairs = 2;  // vectors of x and of grad that a lane loads at a time

// dz is needed twice, for the sums and for dx, and made from x and grad both times:
//   d = x - center,  z = slope d + offset,  dz = grad act'(z),  h_hat = rstd d,
//   dx = slope dz - rstd (m0 + h_hat m1) = slope dz - (constant + linear d).
// A channel's coefficients are (center, slope, offset, rstd) for the first, whose sums are of d in
// place of h_hat, and (center, slope, offset, linear) with the constant for the second.
template <typename T>
__device__ __forceinline__ float4 first_coefficients(const GroupNormSiluBackwardArgs& args,
                                                     int64_t sample, int64_t channel, float mean,
                                                     float rstd) {
  const float added = load_operand<T>(args.channel_bias, sample, channel, 0.0f);
  const auto map = load_affine<T>(args, sample, channel, rstd);
  return make_float4(mean - added, map.slope, map.offset, rstd);
}

// Mean and rstd of a group.
__device__ __forceinline__ float2 load_statistics(const GroupNormSiluBackwardArgs& args,
                                                  int64_t group) {
  return make_float2(__ldg(static_cast<const float*>(args.mean) + group),
                     __ldg(static_cast<const float*>(args.rstd) + group));
}

// m = (m0, m1)
__device__ __forceinline__ float4 second_coefficients(const float4& first, float2 m) {
  return make_float4(first.x, first.y, first.z, first.w * first.w * m.y);
}
__device__ __forceinline__ float second_constant(const float4& first, float2 m) {
  return first.w * m.x;
}

template <typename T, int V>
struct InputPair {
  Vector<T, V> x, grad;
};

template <typename T, int V>
__device__ __forceinline__ InputPair<T, V> load_pair(const GroupNormSiluBackwardArgs& args,
                                                     int64_t index) {
  return {load_global<T, V>(static_cast<const T*>(args.x) + index),
          load_global<T, V>(static_cast<const T*>(args.grad) + index)};
}

// Sums over the items [begin, end), one per channel of an item, in `partials`, with the vectors
// from load(k, item) and coefficients[c], c counted from `base`; keep(k, item, pair) is called for
// each.
template <typename T, bool ChannelsLast, int V, typename Load, typename Keep>
__device__ __forceinline__ void item_gradient_sums(const GroupNormLayout& layout,
                                                   const GroupNormTiling& tiling, int64_t channel,
                                                   int begin, int end, const float4* coefficients,
                                                   int base, const Gate gate, float* partials,
                                                   const Load& load, const Keep& keep) {
  constexpr int A = ChannelsLast ? V : 1;
  for_items<ChannelsLast, V>(layout, tiling, channel, begin, end, [&](const LaneItem& item) {
    GradientSums sums[A];
    for_batches<kGroupNormPairs>(
        item.count, [&](int k) { return load(k, item); },
        [&](int k, auto& pairs) {
          constexpr int R = sizeof(pairs) / sizeof(pairs[0]);
#pragma unroll
          for (int r = 0; r < R; ++r) keep(k + r, item, pairs[r]);
      // Channel by channel, so that in channels_last one channel's coefficients are live at a
      // time. Few summands are added up before they join the sum of a lane.
#pragma unroll
          for (int a = 0; a < A; ++a) {
            const float4 m = coefficients[item.channel - base + a];
            GradientSums batch;
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
              for (int v = a; v < V; v += A) {
                const float d = to_float(pairs[r].x.values[v]) - m.x;
                const float dz = gate.gradient(to_float(pairs[r].grad.values[v]), m.y * d + m.z);
                batch.merge({dz, dz * d, d});
              }
            }
            sums[a].merge(batch);
          }
        });
    store_item<ChannelsLast, V>(tiling, item, begin, sums, partials);
  });
}

// dx on the items [begin, end), with the constants of channels from c on in get_constants(c,
// constants).
template <typename T, bool ChannelsLast, int V, typename Constants, typename Load>
__device__ __forceinline__ void write_grad_x(T* grad_x, const GroupNormLayout& layout,
                                             const GroupNormTiling& tiling, int64_t channel,
                                             int begin, int end, const float4* coefficients,
                                             const Constants& get_constants, int base,
                                             const Gate gate, const Load& load) {
  constexpr int A = ChannelsLast ? V : 1;
  for_items<ChannelsLast, V>(layout, tiling, channel, begin, end, [&](const LaneItem& item) {
    for_batches<kGroupNormPairs>(
        item.count, [&](int k) { return load(k, item); },
        [&](int k, auto& pairs) {
          constexpr int R = sizeof(pairs) / sizeof(pairs[0]);
          float constants[A];
          get_constants(item.channel - base, constants);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            float values[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const float4 m = coefficients[item.channel - base + v % A];
              const float d = to_float(pairs[r].x.values[v]) - m.x;
              const float dz = gate.gradient(to_float(pairs[r].grad.values[v]), m.y * d + m.z);
              values[v] = m.y * dz - (constants[v % A] + m.w * d);
            }
            store_global(grad_x + item.offset + (k + r) * item.stride, values);
          }
        });
  });
}

template <typename T>
__device__ __forceinline__ void store_gradient(const ChannelGradient& gradient, int64_t i,
                                               float value) {
  if (!gradient.data) return;
  if (sizeof(T) == 4 || gradient.type == DType::kFloat32) {
    static_cast<float*>(gradient.data)[i] = value;
  } else {
    static_cast<T*>(gradient.data)[i] = from_float<T>(value);
  }
}

// Where the sums of a backward pass lie in the workspace: parts of the gradients of bias and
// weight, one row for the samples of a block; if split, (m0, m1) per sample and group and the
// chunks' sums too.
struct GradientWorkspace {
  int64_t rows;
  float* parameters;  // (2, rows, C)
  float* means;       // (B, G, 2)
  float* chunks;      // as store_chunk

  FASTDIFF_HD static int64_t parameters_floats(const GroupNormLayout& layout,
                                               const GroupNormPlan& plan) {
    return 2 * (layout.batch / plan.samples) * layout.channels;
  }
  FASTDIFF_HD static int64_t means_floats(const GroupNormLayout& layout) {
    return 2 * layout.batch * layout.groups;
  }
  FASTDIFF_HD GradientWorkspace(void* workspace, const GroupNormLayout& layout,
                                const GroupNormPlan& plan)
      : rows(layout.batch / plan.samples),
        parameters(static_cast<float*>(workspace)),
        means(parameters + parameters_floats(layout, plan)),
        chunks(means + means_floats(layout)) {}
};

// A row's parts of the gradients of bias and weight: the gradients themselves if it is the only
// one.
template <typename T>
__device__ __forceinline__ void store_parameter_sums(const GroupNormSiluBackwardArgs& args,
                                                     const GroupNormPlan& plan, int64_t row,
                                                     int64_t channel, float2 sums) {
  const GradientWorkspace workspace(args.workspace, args.layout, plan);
  if (workspace.rows == 1) {
    store_gradient<T>(args.grad_bias, channel, sums.x);
    store_gradient<T>(args.grad_weight, channel, sums.y);
  } else if (args.grad_weight.data || args.grad_bias.data) {
    float* to = workspace.parameters + row * args.layout.channels + channel;
    to[0] = sums.x;
    to[workspace.rows * args.layout.channels] = sums.y;
  }
}

// What a channel's sums over one sample say about bias and weight.
template <typename T>
__device__ __forceinline__ float2 parameter_sums(const GroupNormSiluBackwardArgs& args,
                                                 int64_t sample, int64_t channel, float s0,
                                                 float s1) {
  const float factor = 1.0f + load_operand<T>(args.scale, sample, channel, 0.0f);
  return make_float2(factor * s0, factor * s1);
}

// The gradients of scale and shift.
template <typename T>
__device__ __forceinline__ void store_modulation_gradients(const GroupNormSiluBackwardArgs& args,
                                                           int64_t sample, int64_t channel,
                                                           float s0, float s1) {
  const int64_t i = sample * args.layout.channels + channel;
  store_gradient<T>(args.grad_shift, i, s0);
  if (!args.grad_scale.data) return;
  const float weight = load_operand<T>(args.weight, sample, channel, 1.0f);
  const float bias = load_operand<T>(args.bias, sample, channel, 0.0f);
  store_gradient<T>(args.grad_scale, i, weight * s1 + bias * s0);
}

// gamma s0 - pixels m0 - s2 m1, times rstd.
template <typename T>
__device__ __forceinline__ void store_channel_bias_gradient(const GroupNormSiluBackwardArgs& args,
                                                            int64_t sample, int64_t channel,
                                                            const float4& first,
                                                            const GradientSums& sums, float2 m) {
  if (!args.grad_channel_bias.data) return;
  const float pixels = static_cast<float>(args.layout.pixels);
  store_gradient<T>(args.grad_channel_bias, sample * args.layout.channels + channel,
                    first.y * sums.s0 - first.w * (pixels * m.x + sums.s2 * m.y));
}

// One pass: reads x and grad once into shared memory, and writes dx from there.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormThreads, 1)
    group_norm_silu_bwd_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                               const int64_t first_block) {
  extern __shared__ float4 shared_of_block[];
  float4* shared = shared_of_block + threadIdx.y * (plan.shared_bytes / 16);
  const GroupNormLayout& layout = args.layout;
  const GroupNormTiling& tiling = plan.tiling;
  const UnitBlock block(plan, first_block + blockIdx.x);
  const int64_t base = block.sample * layout.channels * layout.pixels;
  const int group_channels = static_cast<int>(layout.group_channels());
  const int groups = tiling.channels / group_channels;

  const int64_t data_numel = plan.items_per_block * tiling.item_numel();
  T* data = reinterpret_cast<T*>(shared);
  float4* coefficients = shared + (2 * data_numel * int64_t{sizeof(T)} + 15) / 16;
  // Of a group: first mean and rstd, later m0 and m1.
  float2* means = reinterpret_cast<float2*>(coefficients + tiling.channels);
  GradientSums* channels = reinterpret_cast<GradientSums*>(means + groups);
  float* partials = reinterpret_cast<float*>(channels + tiling.channels);

  for (int g = threadIdx.x; g < groups; g += blockDim.x) {
    const int64_t group = block.sample * layout.groups + block.channel / group_channels + g;
    means[g] = load_statistics(args, group);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < tiling.channels; c += blockDim.x) {
    const float2 s = means[c / group_channels];
    coefficients[c] = first_coefficients<T>(args, block.sample, block.channel + c, s.x, s.y);
  }
  __syncthreads();
  item_gradient_sums<T, ChannelsLast, V>(
      layout, tiling, block.channel, block.begin, block.end, coefficients, 0, Gate(args.activation),
      partials,
      [&](int k, const LaneItem& item) {
        return load_pair<T, V>(args, base + item.offset + k * item.stride);
      },
      [&](int k, const LaneItem& item, const InputPair<T, V>& pair) {
        T* to = data + (item.slot + k * item.slot_stride) * V;
        store_shared(to, pair.x);
        store_shared(to + data_numel, pair.grad);
      });
  __syncthreads();
  if (plan.cluster > 1) cluster_arrive(), cluster_wait();
  merge_unit<GradientSums>(layout, plan, block, partials, [&](int c, const GradientSums& sums) {
    const float rstd = coefficients[c].w;
    channels[c] = {sums.s0, sums.s1 * rstd, sums.s2 * rstd};
  });
  if (plan.cluster > 1) cluster_arrive();  // the others' shared memory is not read any more
  __syncthreads();

  for (int g = threadIdx.x / 32; g < groups; g += blockDim.x / 32) {
    GradientSums group;
    for (int c = threadIdx.x % 32; c < group_channels; c += 32) {
      const GradientSums& sums = channels[g * group_channels + c];
      const float4& m = coefficients[g * group_channels + c];
      const float gamma = m.y / m.w;
      group.merge({gamma * sums.s0, gamma * sums.s1, 0.0f});
    }
    merge_lanes(group, 1, 32);
    if (threadIdx.x % 32) continue;
    const float n = static_cast<float>(layout.group_numel());
    means[g] = make_float2(group.s0 / n, group.s1 / n);
  }
  if (block.rank == 0 && threadIdx.y == 0) {
    for (int c = threadIdx.x; c < tiling.channels; c += blockDim.x) {
      const int64_t channel = block.channel + c;
      const char* from = reinterpret_cast<const char*>(channels + c);
      float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 1
      for (int i = 0; i < plan.samples; ++i, from += plan.shared_bytes) {
        const auto& sums = *reinterpret_cast<const GradientSums*>(from);
        const float2 part = parameter_sums<T>(args, block.sample + i, channel, sums.s0, sums.s1);
        total.x += part.x, total.y += part.y;
      }
      store_parameter_sums<T>(args, plan, block.sample / plan.samples, channel, total);
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < tiling.channels; c += blockDim.x) {
    const float2 m = means[c / group_channels];
    const float4 first = coefficients[c];
    if (block.rank == 0) {
      const int64_t channel = block.channel + c;
      store_modulation_gradients<T>(args, block.sample, channel, channels[c].s0, channels[c].s1);
      store_channel_bias_gradient<T>(args, block.sample, channel, first, channels[c], m);
    }
    coefficients[c] = second_coefficients(first, m);
    channels[c].s0 = second_constant(first, m);  // the sums are not needed any more
  }
  __syncthreads();

  if (args.grad_x) {
    write_grad_x<T, ChannelsLast, V>(
        static_cast<T*>(args.grad_x) + base, layout, tiling, block.channel, block.begin, block.end,
        coefficients,
        [&](int c, auto& constants) {
          constexpr int A = sizeof(constants) / sizeof(float);
#pragma unroll
          for (int a = 0; a < A; ++a) constants[a] = channels[c + a].s0;
        },
        0, Gate(args.activation),
        [&](int k, const LaneItem& item) {
          const T* from = data + (item.slot + k * item.slot_stride) * V;
          return InputPair<T, V>{load_shared<T, V>(from), load_shared<T, V>(from + data_numel)};
        });
  }
  if (plan.cluster > 1) cluster_wait();
}

// Split, first reading of x and grad: the sums of every channel of every chunk.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormSplitThreads, 1)
    group_norm_silu_bwd_sums_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                                    const int64_t first_block) {
  extern __shared__ float4 shared[];
  float4* coefficients = shared;
  float* partials = reinterpret_cast<float*>(shared + plan.chunk_channels());
  float2* statistics = reinterpret_cast<float2*>(partials);  // until the sums take this place
  const ChunkBlock block(plan, first_block + blockIdx.x);
  const ChunkGroups groups(args.layout, block);
  const int64_t base = block.sample * args.layout.channels * args.layout.pixels;
  for (int g = threadIdx.x; g < groups.count; g += blockDim.x) {
    statistics[g] = load_statistics(args, block.sample * args.layout.groups + groups.first + g);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < block.channels; c += blockDim.x) {
    const float2 s = statistics[groups.of(c)];
    coefficients[c] = first_coefficients<T>(args, block.sample, block.channel + c, s.x, s.y);
  }
  __syncthreads();
  item_gradient_sums<T, ChannelsLast, V>(
      args.layout, plan.tiling, 0, block.begin, block.end, coefficients, block.channel,
      Gate(args.activation), partials,
      [&](int k, const LaneItem& item) {
        return load_pair<T, V>(args, base + item.offset + k * item.stride);
      },
      [](int, const LaneItem&, const InputPair<T, V>&) {});
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
  __shared__ float2 shared_mean, statistics;
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
  if (threadIdx.x == 0) statistics = load_statistics(args, group);
  __syncthreads();
  GradientSums sums;
  for (int64_t c = threadIdx.x; c < size; c += blockDim.x) {
    const float gamma = load_operand<T>(args.weight, sample, channel + c, 1.0f) *
                        (1.0f + load_operand<T>(args.scale, sample, channel + c, 0.0f));
    sums.merge({gamma * totals[c], gamma * totals[layout.channels + c], 0.0f});
  }
  merge_block(sums, warps);
  if (threadIdx.x == 0) {
    const float n = static_cast<float>(layout.group_numel());
    shared_mean = make_float2(sums.s0 / n, sums.s1 * statistics.y / n);
    reinterpret_cast<float2*>(workspace.means)[group] = shared_mean;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < size; c += blockDim.x) {
    const GradientSums total = {totals[c], totals[layout.channels + c] * statistics.y,
                                totals[2 * layout.channels + c] * statistics.y};
    store_modulation_gradients<T>(args, sample, channel + c, total.s0, total.s1);
    store_parameter_sums<T>(args, plan, sample, channel + c,
                            parameter_sums<T>(args, sample, channel + c, total.s0, total.s1));
    store_channel_bias_gradient<T>(
        args, sample, channel + c,
        first_coefficients<T>(args, sample, channel + c, statistics.x, statistics.y), total,
        shared_mean);
  }
}

// Split, second reading of x and grad.
template <typename T, bool ChannelsLast, int V>
__global__ void __launch_bounds__(kGroupNormSplitThreads, V == 1 && !ChannelsLast ? 4 : 2)
    group_norm_silu_bwd_apply_kernel(const GroupNormSiluBackwardArgs args, const GroupNormPlan plan,
                                     const int64_t first_block) {
  extern __shared__ float4 shared[];
  float4* coefficients = shared;
  float4* statistics = shared + plan.chunk_channels();  // mean, rstd, m0, m1
  float* constants = reinterpret_cast<float*>(statistics + plan.chunk_channels());
  const GroupNormLayout& layout = args.layout;
  const GradientWorkspace workspace(args.workspace, layout, plan);
  const ChunkBlock block(plan, first_block + blockIdx.x);
  const int64_t base = block.sample * layout.channels * layout.pixels;
  const ChunkGroups groups(layout, block);
  for (int g = threadIdx.x; g < groups.count; g += blockDim.x) {
    const int64_t group = block.sample * layout.groups + groups.first + g;
    const float2 s = load_statistics(args, group);
    const float2 m = reinterpret_cast<const float2*>(workspace.means)[group];
    statistics[g] = make_float4(s.x, s.y, m.x, m.y);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < block.channels; c += blockDim.x) {
    const float4 s = statistics[groups.of(c)];
    const float4 first = first_coefficients<T>(args, block.sample, block.channel + c, s.x, s.y);
    coefficients[c] = second_coefficients(first, make_float2(s.z, s.w));
    constants[c] = second_constant(first, make_float2(s.z, s.w));
  }
  __syncthreads();
  write_grad_x<T, ChannelsLast, V>(
      static_cast<T*>(args.grad_x) + base, layout, plan.tiling, 0, block.begin, block.end,
      coefficients,
      [&](int c, auto& of_lane) {
        constexpr int A = sizeof(of_lane) / sizeof(float);
        Vector<float, A> vector;
        using Access = typename Vector<float, A>::Access;
#pragma unroll
        for (int p = 0; p < Vector<float, A>::kPackets; ++p) {
          vector.packets[p] = reinterpret_cast<const Access*>(constants + c)[p];
        }
#pragma unroll
        for (int a = 0; a < A; ++a) of_lane[a] = vector.values[a];
      },
      block.channel, Gate(args.activation),
      [&](int k, const LaneItem& item) {
        return load_pair<T, V>(args, base + item.offset + k * item.stride);
      });
}

}  // namespace fastdiff
