#pragma once

#include "fastdiff/winograd_conv.h"

#include "tensors.h"

namespace fastdiff::bindings {

template <typename Device>
Tensor winograd_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, int64_t out_channels, bool upsample) {
  const typename Device::Guard guard(x);
  constexpr const char* op = "winograd_conv";
  constexpr ScalarType type = ScalarType::Float;
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == type, op,
                  ": x must be float32 of shape (B, C, H, W)");
  const int64_t channels = x.size(1), scale = upsample ? 2 : 1;
  const int64_t height = scale * x.size(2), width = scale * x.size(3);
  STD_TORCH_CHECK(height % 2 == 0 && width % 2 == 0, op, ": height and width must be even, got ",
                  height, " x ", width);
  STD_TORCH_CHECK(channels > 0 && channels % kWinogradLanes == 0 && out_channels > 0 &&
                      out_channels % kWinogradLanes == 0,
                  op, ": channels must be multiples of ", kWinogradLanes, ", got ", channels,
                  " and ", out_channels);
  check_vector(weight, winograd_points(upsample) * channels * out_channels, type, x, op, "weight");
  if (bias) check_vector(*bias, out_channels, type, x, op, "bias");
  Tensor y = empty_of(std::vector<int64_t>{x.size(0), out_channels, height, width}, x, type, true);
  if (residual) {
    STD_TORCH_CHECK(residual->scalar_type() == type, op, ": residual must be float32");
    check_same_shape(*residual, y, op, "residual");
  }
  if (y.numel() == 0) return y;
  const Tensor x_ready = in_format(x, true), weight_ready = in_format(weight, false);
  std::optional<Tensor> bias_ready, residual_ready;
  if (bias) bias_ready = in_format(*bias, false);
  if (residual) residual_ready = in_format(*residual, true);
  WinogradConvArgs args{};
  args.y = y.mutable_data_ptr<float>();
  args.x = x_ready.const_data_ptr<float>();
  args.weight = weight_ready.const_data_ptr<float>();
  args.bias = bias ? bias_ready->const_data_ptr<float>() : nullptr;
  args.residual = residual ? residual_ready->const_data_ptr<float>() : nullptr;
  args.batch = x.size(0), args.height = height, args.width = width;
  args.channels = channels, args.out_channels = out_channels, args.upsample = upsample;
  Device::winograd_conv(x, args);
  return y;
}

}  // namespace fastdiff::bindings
