#pragma once

#include "fastdiff/dropout.h"
#include "fastdiff/layout.h"

namespace fastdiff {

// The numbers are those of ACTIVATIONS in fastdiff/reference/group_norm_silu.py.
enum class Activation : int32_t { kSilu, kIdentity };

// (B, C, pixels) in memory, or (B, pixels, C) if channels_last. Group g has the channels
// [g C / G, (g + 1) C / G).
struct GroupNormLayout {
  int64_t batch;
  int64_t channels;
  int64_t groups;
  int64_t pixels;  // product of the spatial sizes
  bool channels_last;

  FASTDIFF_HD int64_t group_channels() const { return channels / groups; }
  FASTDIFF_HD int64_t group_numel() const { return group_channels() * pixels; }
};

// A small operand: (C,) with row_stride 0, or (B, C) with any stride between samples (halves of a
// chunked projection need no copy). Channels are adjacent. Its dtype is a run-time value, as it is
// read once per channel: float32, or that of x.
struct ChannelVector {
  const void* data;  // null: absent
  int64_t row_stride;
  DType type;
};

// A gradient of such an operand, contiguous, in the operand's dtype; null if not asked for.
struct ChannelGradient {
  void* data;
  DType type;
};

// y = act(z), z = (h_hat weight + bias) (1 + scale) + shift, h_hat = (h - mean) rstd,
// h = x + channel_bias. Per channel of one sample z = slope (x - center) + offset: what a kernel
// keeps, with center = mean - channel_bias. The difference comes first: slope x + (offset - slope
// center) would round products of the size of slope center, which in a constant group is 300 times
// its value and in a group of a small deviation any number.
//
// So that the center of a constant group is its very value, whatever its channel bias, the forward
// passes take the mean of x + (channel_bias - that of the group's first channel), the group's
// `base`: center = base - (channel_bias - that of the first channel).
template <typename T>
struct ChannelAffine {
  T slope;
  T offset;
};

// `weight`, ... are the values of one channel of one sample; absent ones are their neutral values
// (weight 1, all others 0).
template <typename T>
FASTDIFF_HD ChannelAffine<T> channel_affine(T rstd, T weight, T bias, T scale, T shift) {
  const T factor = T(1) + scale;
  return {rstd * weight * factor, bias * factor + shift};
}

struct GroupNormSiluArgs {
  void* y;          // as x
  void* mean;       // (B, G) float32 (float64 if x is): of h
  void* rstd;       // (B, G) likewise: 1 / sqrt(variance + eps)
  void* workspace;  // CUDA: float32, as many as the launcher asks for
  const void* x;
  ChannelVector weight;        // (C,)
  ChannelVector bias;          // (C,)
  ChannelVector channel_bias;  // (B, C)
  ChannelVector scale;         // (B, C)
  ChannelVector shift;         // (B, C)
  // With a residual, x + residual + sum_bias takes the place of x: it is rounded to x's dtype,
  // written to `sum`, and normalized as it was written.
  const void* residual;    // as x, or null
  ChannelVector sum_bias;  // (C,); only with a residual
  void* sum;               // as x; null if and only if `residual` is
  Dropout dropout;         // of y
  GroupNormLayout layout;
  double eps;
  Activation activation;
  DType x_type;
};

// With dz = grad act'(z), h_hat as above, and per channel of a sample the sums over its pixels
//   s0 = sum dz, s1 = sum dz h_hat, s2 = sum h_hat,
// and per group, gamma = weight (1 + scale), N elements, m0 = sum gamma s0 / N, m1 = sum gamma s1 /
// N:
//   dx = rstd (gamma dz - m0 - h_hat m1)           dchannel_bias = rstd (gamma s0 - pixels m0 - s2
//   m1) dshift = s0          dscale = weight s1 + bias s0 dbias = sum over samples of (1 + scale)
//   s0     dweight = sum over samples of (1 + scale) s1
// With dropout, dz = grad keep scale act'(z). With a residual, x is the sum that was normalized, dx
// has the gradient that comes to the sum from elsewhere added to it and is the gradient of either
// summand, and dsum_bias = sum over samples and pixels of dx.
struct GroupNormSiluBackwardArgs {
  void* grad_x;     // as x, or null
  void* workspace;  // CUDA: float32, as many as the launcher asks for
  ChannelGradient grad_weight;
  ChannelGradient grad_bias;
  ChannelGradient grad_channel_bias;
  ChannelGradient grad_scale;
  ChannelGradient grad_shift;
  const void* grad;  // dtype and layout of x
  const void* x;
  const void* mean;
  const void* rstd;
  ChannelVector weight;
  ChannelVector bias;
  ChannelVector channel_bias;
  ChannelVector scale;
  ChannelVector shift;
  const void* grad_sum;           // as x, or null
  ChannelGradient grad_sum_bias;  // (C,); only with grad_x
  Dropout dropout;
  GroupNormLayout layout;
  Activation activation;
  DType x_type;
};

}  // namespace fastdiff
