#pragma once

#include <cmath>
#include <tuple>

#include "fastdiff/sampler_step.h"

#include "tensors.h"

namespace fastdiff::bindings {

// (B, C, ...) as x_t, or (B, 2C, ...).
inline void check_output(const Tensor& output, const Tensor& x_t, bool one_head, bool two_heads,
                         const char* op, const char* name) {
  check_float(output, op, name);
  bool same = output.dim() == x_t.dim() && output.device() == x_t.device();
  for (int64_t d = 0; same && d < x_t.dim(); ++d) same = d == 1 || output.size(d) == x_t.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape and device of x_t");
  STD_TORCH_CHECK((one_head && output.size(1) == x_t.size(1)) ||
                      (two_heads && output.size(1) == 2 * x_t.size(1)),
                  op, ": ", name, " has ", output.size(1), " channels");
}

// Both steps: `flag` is ddim_step's use_clipped_model_output, or ddpm_step's learned_range.
template <typename Device>
std::tuple<Tensor, Tensor> sampler_step(bool ddpm, const Tensor& x_t, const Tensor& model_output,
                                        const Tensor& step, const Tensor& table, int64_t prediction,
                                        bool clip, bool flag, const std::optional<Tensor>& uncond,
                                        double guidance_scale, const std::optional<Tensor>& noise,
                                        const std::optional<Tensor>& keys,
                                        std::optional<int64_t> seed, int64_t stream,
                                        bool return_pred_x0) {
  const typename Device::Guard guard(x_t);
  const char* op = ddpm ? "ddpm_step" : "ddim_step";
  const bool learned = ddpm && flag;
  STD_TORCH_CHECK(x_t.dim() >= 2, op, ": x_t must have shape (B, C, ...)");
  check_float(x_t, op, "x_t");
  check_output(model_output, x_t, !learned, learned || !ddpm, op, "model_output");
  if (uncond) {
    check_output(*uncond, x_t, !learned, learned || !ddpm, op, "uncond");
    STD_TORCH_CHECK(uncond->size(1) == model_output.size(1), op,
                    ": uncond must have the shape of model_output");
  }
  check_vector(step, x_t.size(0), ScalarType::Long, x_t, op, "step");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kStepColumns &&
                      table.device() == x_t.device() && table.scalar_type() == ScalarType::Float,
                  op, ": table must be float32 (S, ", int(kStepColumns), ") on the device of x_t");
  STD_TORCH_CHECK(prediction >= 0 && prediction <= 3, op, ": prediction must be 0, 1, 2 or 3");
  STD_TORCH_CHECK(std::isfinite(guidance_scale) && guidance_scale >= 0, op,
                  ": guidance_scale must be finite and not negative");
  const int sources = noise.has_value() + keys.has_value() + seed.has_value();
  STD_TORCH_CHECK(sources <= 1 && (sources == 1 || !ddpm), op,
                  ": noise, keys and seed exclude each other, and ddpm_step needs one");
  if (noise) {
    check_same_shape(*noise, x_t, op, "noise");
    check_float(*noise, op, "noise");
  }

  // Kernels take a float32 state with any model output, a half-precision one with its own type or
  // float32, and all in float64; noise is of the state's type. The rest is converted first. The two
  // heads of a 2C output stay together, so that no channels are copied.
  const ScalarType type = x_t.scalar_type();
  const bool wide = type == ScalarType::Double;
  STD_TORCH_CHECK(!wide || (x_t.is_cpu() && !keys && !seed), op,
                  ": float64 kernels exist on the CPU only, and for given noise only");
  const ScalarType compute = wide ? ScalarType::Double : ScalarType::Float;
  const ScalarType x_type = noise && noise->scalar_type() != type ? compute : type;
  ScalarType output_type = model_output.scalar_type();
  const bool keep = !wide && output_type != ScalarType::Double &&
                    (x_type == ScalarType::Float || output_type == x_type);
  if (!keep || (uncond && uncond->scalar_type() != output_type)) output_type = compute;

  const bool channels_last = is_channels_last(x_t);
  const auto ready = [&](const Tensor& x, ScalarType wanted) {
    return in_format(x.scalar_type() == wanted ? x : converted(x, wanted), channels_last);
  };
  const Tensor x_ready = ready(x_t, x_type), output_ready = ready(model_output, output_type);
  const Tensor uncond_ready = uncond ? ready(*uncond, output_type) : output_ready;
  const Tensor noise_ready = noise ? ready(*noise, x_type) : x_ready;
  const std::optional<Tensor> keys_ready = checked_keys(keys, x_t, op);
  const Tensor step_ready = in_format(step, false), table_ready = in_format(table, false);
  Device::check_rows(step_ready, table.size(0), op, "step");

  Tensor x_s = empty(x_t, x_type, channels_last);
  Tensor pred_x0 = return_pred_x0 ? empty(x_t, x_type, channels_last) : empty_of({0}, x_t, type);
  if (x_s.numel() > 0) {
    SamplerStepArgs args{};
    args.x_s = x_s.mutable_data_ptr();
    args.pred_x0 = return_pred_x0 ? pred_x0.mutable_data_ptr() : nullptr;
    args.x_t = x_ready.const_data_ptr();
    args.model_output = output_ready.const_data_ptr();
    args.uncond = uncond ? uncond_ready.const_data_ptr() : nullptr;
    args.step = step_ready.const_data_ptr<int64_t>();
    args.table = table_ready.const_data_ptr<float>();
    args.num_rows = table.size(0);
    args.guidance_scale = guidance_scale;
    args.noise = noise ? noise_ready.const_data_ptr() : nullptr;
    args.source = noise_source(keys_ready, seed, stream);
    args.mode = noise ? NoiseMode::kGiven : sources == 1 ? NoiseMode::kGenerated : NoiseMode::kNone;
    args.layout = sample_layout(x_t, channels_last);
    args.prediction = static_cast<Prediction>(prediction);
    args.eps = ddpm           ? EpsSource::kNone
               : clip && flag ? EpsSource::kX0
               : args.prediction == Prediction::kEps || args.prediction == Prediction::kV
                   ? EpsSource::kOutput
                   : EpsSource::kUnclippedX0;
    args.clip = clip;
    args.two_heads = model_output.size(1) != x_t.size(1);
    args.learned = learned;
    args.x_type = dtype_of(x_type, op, "x_t");
    args.output_type = dtype_of(output_type, op, "model_output");
    ddpm ? Device::ddpm_step(x_t, args) : Device::ddim_step(x_t, args);
  }
  const auto finished = [&](const Tensor& x) {
    return x.scalar_type() == type ? x : converted(x, type);
  };
  return {finished(x_s), finished(pred_x0)};
}

template <typename Device>
std::tuple<Tensor, Tensor> ddim_step(const Tensor& x_t, const Tensor& model_output,
                                     const Tensor& step, const Tensor& table, int64_t prediction,
                                     bool clip, bool use_clipped_model_output,
                                     const std::optional<Tensor>& uncond, double guidance_scale,
                                     const std::optional<Tensor>& noise,
                                     const std::optional<Tensor>& keys, std::optional<int64_t> seed,
                                     int64_t stream, bool return_pred_x0) {
  return sampler_step<Device>(false, x_t, model_output, step, table, prediction, clip,
                              use_clipped_model_output, uncond, guidance_scale, noise, keys, seed,
                              stream, return_pred_x0);
}

template <typename Device>
std::tuple<Tensor, Tensor> ddpm_step(const Tensor& x_t, const Tensor& model_output,
                                     const Tensor& step, const Tensor& table, int64_t prediction,
                                     bool clip, bool learned_range,
                                     const std::optional<Tensor>& uncond, double guidance_scale,
                                     const std::optional<Tensor>& noise,
                                     const std::optional<Tensor>& keys, std::optional<int64_t> seed,
                                     int64_t stream, bool return_pred_x0) {
  return sampler_step<Device>(true, x_t, model_output, step, table, prediction, clip, learned_range,
                              uncond, guidance_scale, noise, keys, seed, stream, return_pred_x0);
}

}  // namespace fastdiff::bindings
