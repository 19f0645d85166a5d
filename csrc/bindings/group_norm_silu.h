#pragma once

#include <tuple>

#include "fastdiff/group_norm_silu.h"

#include "tensors.h"

namespace fastdiff::bindings {

// A (C,) or (B, C) operand as kernels read it: float32 or x's dtype, adjacent channels.
struct ChannelOperand {
  std::optional<Tensor> given, ready;

  ChannelOperand(const std::optional<Tensor>& operand, bool per_sample, const Tensor& x,
                 const char* name)
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

  GroupNormSiluCall(const Tensor& x_in, int64_t num_groups, const std::optional<Tensor>& weight_in,
                    const std::optional<Tensor>& bias_in,
                    const std::optional<Tensor>& channel_bias_in,
                    const std::optional<Tensor>& scale_in, const std::optional<Tensor>& shift_in,
                    int64_t activation)
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

// y, mean and rstd.
template <typename Device>
std::tuple<Tensor, Tensor, Tensor> group_norm_silu(
    const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& channel_bias,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t activation) {
  const typename Device::Guard guard(x);
  STD_TORCH_CHECK(eps > 0, "group_norm_silu: eps must be positive");
  const GroupNormSiluCall call(x, num_groups, weight, bias, channel_bias, scale, shift, activation);
  Tensor y = empty(call.x, call.x.scalar_type(), call.channels_last);
  Tensor mean = call.empty_statistic(), rstd = call.empty_statistic();
  if (y.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(rstd);
    return {y, mean, rstd};
  }
  auto args = call.args<GroupNormSiluArgs>(activation);
  args.y = y.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  args.eps = eps;
  const std::optional<Tensor> workspace = workspace_of(Device::workspace(args), x);
  if (workspace) args.workspace = workspace->mutable_data_ptr();
  Device::group_norm_silu(x, args);
  return {y, mean, rstd};
}

// The gradients of x and the small operands; (0,) tensors for those not asked for.
template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& channel_bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t activation, bool need_x, bool need_weight,
    bool need_bias, bool need_channel_bias, bool need_scale, bool need_shift) {
  const typename Device::Guard guard(x);
  constexpr const char* op = "group_norm_silu";
  const GroupNormSiluCall call(x, num_groups, weight, bias, channel_bias, scale, shift, activation);
  check_float(grad, op, "grad");
  check_same_shape(grad, x, op, "grad");
  const ScalarType type = call.x.scalar_type();
  const Tensor grad_ready =
      in_format(grad.scalar_type() == type ? grad : converted(grad, type), call.channels_last);
  const Tensor mean_ready = call.statistic(mean, "mean"), rstd_ready = call.statistic(rstd, "rstd");

  auto args = call.args<GroupNormSiluBackwardArgs>(activation);
  args.grad = grad_ready.const_data_ptr();
  args.mean = mean_ready.const_data_ptr();
  args.rstd = rstd_ready.const_data_ptr();
  Tensor grad_x = need_x ? empty(call.x, type, call.channels_last) : empty_of({0}, x, type);
  args.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  const bool is_empty = x.numel() == 0;
  const auto output = [&](bool needed, const ChannelOperand& operand, const char* name,
                          ChannelGradient& gradient) {
    if (!needed) return empty_of({0}, x, type);
    STD_TORCH_CHECK(operand.ready, op, ": ", name, " is absent and has no gradient");
    const auto sizes = operand.ready->sizes();
    Tensor out =
        empty_of(std::vector<int64_t>(sizes.begin(), sizes.end()), x, operand.ready->scalar_type());
    if (is_empty) torch::stable::zero_(out);
    gradient = {out.mutable_data_ptr(), dtype_of(out.scalar_type(), op, name)};
    return out;
  };
  Tensor grad_weight = output(need_weight, call.weight, "weight", args.grad_weight);
  Tensor grad_bias = output(need_bias, call.bias, "bias", args.grad_bias);
  Tensor grad_channel_bias =
      output(need_channel_bias, call.channel_bias, "channel_bias", args.grad_channel_bias);
  Tensor grad_scale = output(need_scale, call.scale, "scale", args.grad_scale);
  Tensor grad_shift = output(need_shift, call.shift, "shift", args.grad_shift);
  const bool any =
      need_x || need_weight || need_bias || need_channel_bias || need_scale || need_shift;
  if (any && !is_empty) {
    const std::optional<Tensor> workspace = workspace_of(Device::workspace(args), x);
    if (workspace) args.workspace = workspace->mutable_data_ptr();
    Device::group_norm_silu_backward(x, args);
  }
  // An operand in a dtype that kernels do not take was converted, and so is its gradient.
  const auto restored = [](const Tensor& out, bool needed, const ChannelOperand& operand) {
    const bool same = !needed || out.scalar_type() == operand.given->scalar_type();
    return same ? out : converted(out, operand.given->scalar_type());
  };
  return {grad_x,
          restored(grad_weight, need_weight, call.weight),
          restored(grad_bias, need_bias, call.bias),
          restored(grad_channel_bias, need_channel_bias, call.channel_bias),
          restored(grad_scale, need_scale, call.scale),
          restored(grad_shift, need_shift, call.shift)};
}

}  // namespace fastdiff::bindings
