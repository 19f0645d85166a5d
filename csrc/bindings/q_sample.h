#pragma once

#include "fastdiff/q_sample.h"

#include "tensors.h"

namespace fastdiff::bindings {

template <typename Device>
Tensor q_sample(const Tensor& x0, const Tensor& t, const Tensor& sqrt_alpha_bar,
                const Tensor& sqrt_one_minus_alpha_bar, const std::optional<Tensor>& noise,
                const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
                const std::optional<Tensor>& flip, std::optional<ScalarType> dtype) {
  const typename Device::Guard guard(x0);
  constexpr const char* op = "q_sample";
  STD_TORCH_CHECK(x0.dim() >= 1, op, ": x0 must have shape (B, ...)");
  STD_TORCH_CHECK(sqrt_alpha_bar.dim() == 1, op, ": sqrt_alpha_bar must have shape (T,)");
  const int64_t batch = x0.size(0), num_timesteps = sqrt_alpha_bar.size(0);
  check_vector(t, batch, ScalarType::Long, x0, op, "t");
  check_vector(sqrt_alpha_bar, num_timesteps, ScalarType::Float, x0, op, "sqrt_alpha_bar");
  check_vector(sqrt_one_minus_alpha_bar, num_timesteps, ScalarType::Float, x0, op,
               "sqrt_one_minus_alpha_bar");
  STD_TORCH_CHECK(noise.has_value() + keys.has_value() + seed.has_value() <= 1, op,
                  ": noise, keys and seed exclude each other");
  if (noise) {
    check_same_shape(*noise, x0, op, "noise");
    check_float(*noise, op, "noise");
  }
  if (flip) {
    check_vector(*flip, batch, ScalarType::Bool, x0, op, "flip");
    STD_TORCH_CHECK(x0.dim() >= 2, op, ": flip needs x0 with a width");
  }

  const ScalarType x0_type = x0.scalar_type();
  const ScalarType out_type =
      dtype.value_or(x0_type == ScalarType::Byte ? ScalarType::Float : x0_type);
  if (x0_type != ScalarType::Byte) check_float(x0, op, "x0");
  STD_TORCH_CHECK(is_float(out_type), op, ": dtype must be a floating-point dtype");
  const bool wide = x0_type == ScalarType::Double || out_type == ScalarType::Double;
  STD_TORCH_CHECK(!wide || (x0.is_cpu() && !keys && !seed), op,
                  ": float64 kernels exist on the CPU only, and for given noise only");
  STD_TORCH_CHECK(!wide || x0_type != ScalarType::Byte, op, ": uint8 x0 has no float64 kernel");
  // Kernels compute in float32 and take inputs of that type, of the result's, or uint8 levels;
  // those in float64 take nothing else. The rest is converted first.
  const ScalarType compute = wide ? ScalarType::Double : ScalarType::Float;
  const bool channels_last = is_channels_last(x0);
  const auto prepared = [&](const Tensor& x) {
    const ScalarType type = x.scalar_type();
    const bool keep = !wide && (type == out_type || type == ScalarType::Byte);
    return in_format(keep || type == compute ? x : converted(x, compute), channels_last);
  };
  const Tensor x0_ready = prepared(x0);
  const std::optional<Tensor> noise_ready = noise ? std::optional(prepared(*noise)) : std::nullopt;
  const Tensor t_ready = in_format(t, false), a_ready = in_format(sqrt_alpha_bar, false),
               b_ready = in_format(sqrt_one_minus_alpha_bar, false);
  Device::check_rows(t_ready, num_timesteps, op, "t");
  const std::optional<Tensor> keys_ready = checked_keys(keys, x0, op);
  const std::optional<Tensor> flip_ready =
      flip ? std::optional(in_format(*flip, false)) : std::nullopt;

  const ScalarType kernel_type = wide ? ScalarType::Double : out_type;
  Tensor out = empty(x0, kernel_type, channels_last);
  if (out.numel() > 0) {
    QSampleArgs args{};
    args.out = out.mutable_data_ptr();
    args.x0 = x0_ready.const_data_ptr();
    args.t = t_ready.const_data_ptr<int64_t>();
    args.sqrt_alpha_bar = a_ready.const_data_ptr<float>();
    args.sqrt_one_minus_alpha_bar = b_ready.const_data_ptr<float>();
    args.flip = flip_ready ? flip_ready->const_data_ptr<bool>() : nullptr;
    args.num_timesteps = num_timesteps;
    set_noise(args, noise_ready, keys_ready, seed, stream, op);
    args.layout = sample_layout(x0, channels_last);
    args.out_type = dtype_of(kernel_type, op, "the result");
    args.x0_type = dtype_of(x0_ready.scalar_type(), op, "x0");
    Device::q_sample(x0, args);
  }
  return kernel_type == out_type ? out : converted(out, out_type);
}

}  // namespace fastdiff::bindings
