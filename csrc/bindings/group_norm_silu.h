#pragma once

#include <tuple>

#include "fastdiff/group_norm_silu.h"

#include "tensors.h"

namespace fastdiff::bindings {

using Operand = std::optional<Tensor>;

// A (C,) or (B, C) operand as kernels read it: float32 or x's dtype, adjacent channels.
struct ChannelOperand {
  Operand given, ready;

  ChannelOperand(const Operand& operand, bool per_sample, const Tensor& x, const char* name)
      : given(operand) {
    constexpr const char* op = "group_norm_silu";
    if (!given) return;
    check_float(*given, op, name);
    STD_TORCH_CHECK(given->device() == x.device(), op, ": ", name, " is on another device");
    if (per_sample) {
      STD_TORCH_CHECK(
          given->dim() == 2 && given->size(0) == x.size(0) && given->size(1) == x.size(1), op, ": ",
          name, " must have shape (B, C) = (", x.size(0), ", ", x.size(1), ")");
    } else {
      STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == x.size(1), op, ": ", name,
                      " must have shape (C,) = (", x.size(1), ",)");
    }
    const ScalarType type = given->scalar_type(), wide = ScalarType::Double;
    const bool keep =
        type == x.scalar_type() || (type == ScalarType::Float && x.scalar_type() != wide);
    ready = keep ? *given : converted(*given, x.scalar_type() == wide ? wide : ScalarType::Float);
    if (ready->size(-1) > 1 && ready->stride(-1) != 1) ready = in_format(*ready, false);
  }

  ChannelVector vector(const char* name) const {
    if (!ready) return {nullptr, 0, DType::kFloat32};
    const int64_t row_stride = ready->dim() == 2 ? ready->stride(0) : 0;
    return {ready->const_data_ptr(), row_stride,
            dtype_of(ready->scalar_type(), "group_norm_silu", name)};
  }
};

// The arguments of both passes, checked and brought into one memory format; owns what they point
// to.
struct GroupNormSiluCall {
  Tensor x;
  ChannelOperand weight, bias, channel_bias, scale, shift;
  ScalarType compute;  // of mean and rstd
  bool channels_last;
  GroupNormLayout layout{};

  GroupNormSiluCall(const Tensor& x_in, int64_t num_groups, const Operand& weight_in,
                    const Operand& bias_in, const Operand& channel_bias_in, const Operand& scale_in,
                    const Operand& shift_in, int64_t activation)
      : x(checked(x_in)),
        weight(weight_in, false, x, "weight"),
        bias(bias_in, false, x, "bias"),
        channel_bias(channel_bias_in, true, x, "channel_bias"),
        scale(scale_in, true, x, "scale"),
        shift(shift_in, true, x, "shift") {
    constexpr const char* op = "group_norm_silu";
    const bool wide = x.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(!wide || x.is_cpu(), op, ": float64 kernels exist on the CPU only");
    STD_TORCH_CHECK(num_groups >= 1 && x.size(1) % num_groups == 0, op, ": num_groups is ",
                    num_groups, ", expected a divisor of the ", x.size(1), " channels of x");
    STD_TORCH_CHECK(activation == 0 || activation == 1, op, ": activation must be 0 or 1");
    compute = wide ? ScalarType::Double : ScalarType::Float;
    channels_last = is_channels_last(x);
    x = in_format(x, channels_last);
    layout.batch = x.size(0);
    layout.channels = x.size(1);
    layout.groups = num_groups;
    layout.pixels = 1;
    layout.channels_last = channels_last;
    for (int64_t d = 2; d < x.dim(); ++d) layout.pixels *= x.size(d);
  }

  static const Tensor& checked(const Tensor& x) {
    check_float(x, "group_norm_silu", "x");
    STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5,
                    "group_norm_silu: x must have shape (B, C, *spatial)");
    return x;
  }

  // What the argument structs of both passes share.
  template <typename Args>
  Args args(int64_t activation) const {
    Args args{};
    args.x = x.const_data_ptr();
    args.weight = weight.vector("weight");
    args.bias = bias.vector("bias");
    args.channel_bias = channel_bias.vector("channel_bias");
    args.scale = scale.vector("scale");
    args.shift = shift.vector("shift");
    args.layout = layout;
    args.activation = static_cast<Activation>(activation);
    args.x_type = dtype_of(x.scalar_type(), "group_norm_silu", "x");
    return args;
  }

  Tensor empty_like_x() const { return empty(x, x.scalar_type(), channels_last); }

  // A tensor of x's shape as kernels read it: in its dtype and memory format.
  Tensor like_x(const Tensor& given, const char* name) const {
    constexpr const char* op = "group_norm_silu";
    check_float(given, op, name);
    check_same_shape(given, x, op, name);
    const ScalarType type = x.scalar_type();
    return in_format(given.scalar_type() == type ? given : converted(given, type), channels_last);
  }

  Tensor empty_statistic() const { return empty_of({layout.batch, layout.groups}, x, compute); }

  Tensor statistic(const Tensor& given, const char* name) const {
    constexpr const char* op = "group_norm_silu";
    STD_TORCH_CHECK(given.dim() == 2 && given.size(0) == layout.batch &&
                        given.size(1) == layout.groups && given.scalar_type() == compute &&
                        given.device() == x.device(),
                    op, ": ", name, " must be the one of the forward pass");
    return in_format(given, false);
  }
};

// The arguments of dropout, checked; owns what they point to.
struct DropoutCall {
  Operand keys;
  Dropout args{};

  DropoutCall() = default;
  DropoutCall(const Tensor& x, int64_t threshold, const Operand& keys_in,
              std::optional<int64_t> seed, int64_t stream)
      : keys(checked_keys(keys_in, x, "group_norm_silu")) {
    constexpr const char* op = "group_norm_silu";
    STD_TORCH_CHECK(threshold >= 1 && threshold <= 255, op, ": threshold must be 1 to 255");
    STD_TORCH_CHECK(keys.has_value() != seed.has_value(), op, ": dropout takes keys or seed");
    args = {noise_source(keys, seed, stream), static_cast<int32_t>(threshold)};
  }
};

// Runs the forward pass of `args`, which has what is not told here; y, mean and rstd.
template <typename Device>
std::tuple<Tensor, Tensor, Tensor> run_forward(const GroupNormSiluCall& call, double eps,
                                               GroupNormSiluArgs args) {
  STD_TORCH_CHECK(eps > 0, "group_norm_silu: eps must be positive");
  Tensor y = call.empty_like_x(), mean = call.empty_statistic(), rstd = call.empty_statistic();
  if (y.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(rstd);
    return {y, mean, rstd};
  }
  args.y = y.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  args.eps = eps;
  const Operand workspace = workspace_of(Device::workspace(args), call.x);
  if (workspace) args.workspace = workspace->mutable_data_ptr();
  Device::group_norm_silu(call.x, args);
  return {y, mean, rstd};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, int64_t num_groups,
                                                   const Operand& weight, const Operand& bias,
                                                   double eps, const Operand& channel_bias,
                                                   const Operand& scale, const Operand& shift,
                                                   int64_t activation) {
  const typename Device::Guard guard(x);
  const GroupNormSiluCall call(x, num_groups, weight, bias, channel_bias, scale, shift, activation);
  return run_forward<Device>(call, eps, call.args<GroupNormSiluArgs>(activation));
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> group_norm_silu_dropout(
    const Tensor& x, int64_t num_groups, const Operand& weight, const Operand& bias, double eps,
    const Operand& channel_bias, const Operand& scale, const Operand& shift, int64_t activation,
    int64_t threshold, const Operand& keys, std::optional<int64_t> seed, int64_t stream) {
  const typename Device::Guard guard(x);
  const GroupNormSiluCall call(x, num_groups, weight, bias, channel_bias, scale, shift, activation);
  const DropoutCall dropout(x, threshold, keys, seed, stream);
  auto args = call.args<GroupNormSiluArgs>(activation);
  args.dropout = dropout.args;
  return run_forward<Device>(call, eps, args);
}

// The sum, y, mean and rstd.
template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_group_norm_silu(
    const Tensor& x, const Tensor& residual, int64_t num_groups, const Operand& weight,
    const Operand& bias, double eps, const Operand& scale, const Operand& shift, int64_t activation,
    const Operand& sum_bias) {
  const typename Device::Guard guard(x);
  const GroupNormSiluCall call(x, num_groups, weight, bias, std::nullopt, scale, shift, activation);
  const ChannelOperand bias_of_sum(sum_bias, false, x, "sum_bias");
  STD_TORCH_CHECK(residual.scalar_type() == x.scalar_type(),
                  "group_norm_silu: residual must have the dtype of x");
  const Tensor residual_ready = call.like_x(residual, "residual");
  Tensor sum = call.empty_like_x();
  auto args = call.args<GroupNormSiluArgs>(activation);
  args.residual = residual_ready.const_data_ptr();
  args.sum_bias = bias_of_sum.vector("sum_bias");
  args.sum = sum.mutable_data_ptr();
  return std::tuple_cat(std::tuple(sum), run_forward<Device>(call, eps, args));
}

// A backward pass: its call, and the gradients that are asked for, of which those of operands that
// kernels take in another dtype are converted back at the end.
struct GroupNormSiluGradients {
  const GroupNormSiluCall& call;
  const Tensor grad, mean, rstd;
  GroupNormSiluBackwardArgs args;
  bool any = false;

  GroupNormSiluGradients(const GroupNormSiluCall& the_call, const Tensor& grad_in,
                         const Tensor& mean_in, const Tensor& rstd_in, int64_t activation)
      : call(the_call),
        grad(call.like_x(grad_in, "grad")),
        mean(call.statistic(mean_in, "mean")),
        rstd(call.statistic(rstd_in, "rstd")),
        args(call.args<GroupNormSiluBackwardArgs>(activation)) {
    args.grad = grad.const_data_ptr();
    args.mean = mean.const_data_ptr();
    args.rstd = rstd.const_data_ptr();
  }

  bool is_empty() const { return call.x.numel() == 0; }

  Tensor of_x(bool needed) {
    if (!needed) return none();
    any = true;
    Tensor out = call.empty_like_x();
    args.grad_x = out.mutable_data_ptr();
    return out;
  }

  Tensor of(bool needed, const ChannelOperand& operand, const char* name,
            ChannelGradient& gradient) {
    if (!needed) return none();
    any = true;
    constexpr const char* op = "group_norm_silu";
    STD_TORCH_CHECK(operand.ready, op, ": ", name, " is absent and has no gradient");
    const auto sizes = operand.ready->sizes();
    Tensor out = empty_of(std::vector<int64_t>(sizes.begin(), sizes.end()), call.x,
                          operand.ready->scalar_type());
    if (is_empty()) torch::stable::zero_(out);
    gradient = {out.mutable_data_ptr(), dtype_of(out.scalar_type(), op, name)};
    return out;
  }

  template <typename Device>
  void run() {
    if (!any || is_empty()) return;
    const Operand workspace = workspace_of(Device::workspace(args), call.x);
    if (workspace) args.workspace = workspace->mutable_data_ptr();
    Device::group_norm_silu_backward(call.x, args);
  }

  static Tensor restored(const Tensor& out, bool needed, const ChannelOperand& operand) {
    const bool same = !needed || out.scalar_type() == operand.given->scalar_type();
    return same ? out : converted(out, operand.given->scalar_type());
  }

  Tensor none() const { return empty_of({0}, call.x, call.x.scalar_type()); }
};

// The gradients of x and the small operands; (0,) tensors for those not asked for.
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename Device>
SixTensors run_backward(const GroupNormSiluCall& call, GroupNormSiluGradients& gradients,
                        bool need_x, bool need_weight, bool need_bias, bool need_channel_bias,
                        bool need_scale, bool need_shift) {
  auto& args = gradients.args;
  const Tensor x = gradients.of_x(need_x);
  const Tensor weight = gradients.of(need_weight, call.weight, "weight", args.grad_weight);
  const Tensor bias = gradients.of(need_bias, call.bias, "bias", args.grad_bias);
  const Tensor channel_bias =
      gradients.of(need_channel_bias, call.channel_bias, "channel_bias", args.grad_channel_bias);
  const Tensor scale = gradients.of(need_scale, call.scale, "scale", args.grad_scale);
  const Tensor shift = gradients.of(need_shift, call.shift, "shift", args.grad_shift);
  gradients.run<Device>();
  return {x,
          gradients.restored(weight, need_weight, call.weight),
          gradients.restored(bias, need_bias, call.bias),
          gradients.restored(channel_bias, need_channel_bias, call.channel_bias),
          gradients.restored(scale, need_scale, call.scale),
          gradients.restored(shift, need_shift, call.shift)};
}

template <typename Device>
SixTensors group_norm_silu_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                    const Tensor& rstd, int64_t num_groups, const Operand& weight,
                                    const Operand& bias, const Operand& channel_bias,
                                    const Operand& scale, const Operand& shift, int64_t activation,
                                    bool need_x, bool need_weight, bool need_bias,
                                    bool need_channel_bias, bool need_scale, bool need_shift) {
  const typename Device::Guard guard(x);
  const GroupNormSiluCall call(x, num_groups, weight, bias, channel_bias, scale, shift, activation);
  GroupNormSiluGradients gradients(call, grad, mean, rstd, activation);
  return run_backward<Device>(call, gradients, need_x, need_weight, need_bias, need_channel_bias,
                              need_scale, need_shift);
}

template <typename Device>
SixTensors group_norm_silu_dropout_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
    const Operand& weight, const Operand& bias, const Operand& channel_bias, const Operand& scale,
    const Operand& shift, int64_t activation, bool need_x, bool need_weight, bool need_bias,
    bool need_channel_bias, bool need_scale, bool need_shift, int64_t threshold,
    const Operand& keys, std::optional<int64_t> seed, int64_t stream) {
  const typename Device::Guard guard(x);
  const GroupNormSiluCall call(x, num_groups, weight, bias, channel_bias, scale, shift, activation);
  const DropoutCall dropout(x, threshold, keys, seed, stream);
  GroupNormSiluGradients gradients(call, grad, mean, rstd, activation);
  gradients.args.dropout = dropout.args;
  return run_backward<Device>(call, gradients, need_x, need_weight, need_bias, need_channel_bias,
                              need_scale, need_shift);
}

// The gradients of either summand, weight, bias, scale, shift and sum_bias.
template <typename Device>
SixTensors residual_group_norm_silu_backward(const Tensor& grad, const Operand& grad_sum,
                                             const Tensor& sum, const Tensor& mean,
                                             const Tensor& rstd, int64_t num_groups,
                                             const Operand& weight, const Operand& bias,
                                             const Operand& scale, const Operand& shift,
                                             int64_t activation, const Operand& sum_bias,
                                             bool need_x, bool need_weight, bool need_bias,
                                             bool need_scale, bool need_shift, bool need_sum_bias) {
  const typename Device::Guard guard(sum);
  const GroupNormSiluCall call(sum, num_groups, weight, bias, std::nullopt, scale, shift,
                               activation);
  const ChannelOperand bias_of_sum(sum_bias, false, sum, "sum_bias");
  GroupNormSiluGradients gradients(call, grad, mean, rstd, activation);
  auto& args = gradients.args;
  Operand grad_sum_ready;
  if (grad_sum) {
    grad_sum_ready = call.like_x(*grad_sum, "grad_sum");
    args.grad_sum = grad_sum_ready->const_data_ptr();
  }
  const Tensor of_sum_bias =
      gradients.of(need_sum_bias, bias_of_sum, "sum_bias", args.grad_sum_bias);
  // Kernels add up the gradient of sum_bias where they write that of x.
  const auto [x, of_weight, of_bias, of_channel_bias, of_scale, of_shift] =
      run_backward<Device>(call, gradients, need_x || need_sum_bias, need_weight, need_bias, false,
                           need_scale, need_shift);
  return {need_x ? x : gradients.none(),
          of_weight,
          of_bias,
          of_scale,
          of_shift,
          gradients.restored(of_sum_bias, need_sum_bias, bias_of_sum)};
}

}  // namespace fastdiff::bindings
