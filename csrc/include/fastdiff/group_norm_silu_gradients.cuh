#pragma once

// What the backward kernels of group_norm_silu leave of the small operands.

#include "fastdiff/group_norm_silu_blocks.cuh"

namespace fastdiff {

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
// chunks' sums too. The sums of grad_x for the bias of a residual sum are one row for a block of
// one pass, or for a chunk, where they take the place of its other sums.
struct GradientWorkspace {
  int64_t rows, sum_rows;
  float* parameters;  // (2, rows, C)
  float* means;       // (B, G, 2)
  float* chunks;      // as store_chunk
  float* sums;        // (sum_rows, C)

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
        sum_rows(plan.one_pass ? rows * plan.cluster : layout.batch * plan.chunks),
        parameters(static_cast<float*>(workspace)),
        means(parameters + parameters_floats(layout, plan)),
        chunks(means + means_floats(layout)),
        sums(plan.one_pass ? means : chunks) {}
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

// rstd (gamma s0 - pixels m0 - s2 m1), m = (m0, m1).
template <typename T>
__device__ __forceinline__ void store_channel_bias_gradient(const GroupNormSiluBackwardArgs& args,
                                                            int64_t sample, int64_t channel,
                                                            float gamma, float rstd,
                                                            const GradientSums& sums, float2 m) {
  if (!args.grad_channel_bias.data) return;
  const float pixels = static_cast<float>(args.layout.pixels);
  store_gradient<T>(args.grad_channel_bias, sample * args.layout.channels + channel,
                    rstd * (gamma * sums.s0 - (pixels * m.x + sums.s2 * m.y)));
}

}  // namespace fastdiff
