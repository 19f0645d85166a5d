#pragma once

#include "fastdiff/vlb_terms.h"

#include "tensors.h"

namespace fastdiff::bindings {

// The arguments of both passes, checked and brought into one memory format; owns what they point
// to.
struct VlbTermsCall {
  VlbTermsArgs args{};
  Tensor x0, x_t, model_output, t, table;
  std::optional<Tensor> noise, keys;
  bool channels_last;

  VlbTermsCall(const Tensor& x0_in, const Tensor& x_t_in, const Tensor& model_output_in,
               const Tensor& t_in, const Tensor& table_in, const std::optional<Tensor>& noise_in,
               const std::optional<Tensor>& keys_in, std::optional<int64_t> seed, int64_t stream,
               int64_t prediction, bool learned, bool clip, bool detach_mean) {
    constexpr const char* op = "vlb_terms";
    STD_TORCH_CHECK(x_t_in.dim() >= 2, op, ": x_t must have shape (B, C, ...)");
    check_float(x_t_in, op, "x_t");
    check_same_shape(x0_in, x_t_in, op, "x0");
    check_float(x0_in, op, "x0");
    check_float(model_output_in, op, "model_output");
    bool same =
        model_output_in.dim() == x_t_in.dim() && model_output_in.device() == x_t_in.device();
    for (int64_t d = 0; same && d < x_t_in.dim(); ++d) {
      same = model_output_in.size(d) == x_t_in.size(d) * (d == 1 && learned ? 2 : 1);
    }
    STD_TORCH_CHECK(same, op, ": model_output must have the shape and device of x_t",
                    learned ? ", with twice the channels" : "");
    check_vector(t_in, x_t_in.size(0), ScalarType::Long, x_t_in, op, "t");
    STD_TORCH_CHECK(
        table_in.dim() == 2 && table_in.size(1) == kStepColumns &&
            table_in.device() == x_t_in.device() && table_in.scalar_type() == ScalarType::Float,
        op, ": table must be float32 (T, ", int(kStepColumns), ") on the device of x_t");
    STD_TORCH_CHECK(noise_in.has_value() + keys_in.has_value() + seed.has_value() == 1, op,
                    ": pass one of noise, keys and seed");
    if (noise_in) {
      check_same_shape(*noise_in, x_t_in, op, "noise");
      check_float(*noise_in, op, "noise");
    }
    STD_TORCH_CHECK(prediction >= 0 && prediction <= 3, op, ": prediction must be 0, 1, 2 or 3");

    // x0, x_t and noise share a dtype: float32, or that of the model's output.
    const ScalarType output_type = model_output_in.scalar_type(), type = x_t_in.scalar_type();
    for (const ScalarType each : {output_type, type, x0_in.scalar_type()}) {
      STD_TORCH_CHECK(each != ScalarType::Double, op, ": there are no float64 kernels");
    }
    const bool keep = type == output_type && x0_in.scalar_type() == type &&
                      (!noise_in || noise_in->scalar_type() == type);
    const ScalarType data_type = keep ? type : ScalarType::Float;
    channels_last = is_channels_last(x_t_in);
    const auto ready = [&](const Tensor& x) {
      const bool convert = x.scalar_type() != data_type;
      return in_format(convert ? converted(x, data_type) : x, channels_last);
    };
    x0 = ready(x0_in);
    x_t = ready(x_t_in);
    model_output = in_format(model_output_in, channels_last);
    if (noise_in) noise = ready(*noise_in);
    keys = checked_keys(keys_in, x_t_in, op);
    t = in_format(t_in, false);
    table = in_format(table_in, false);

    args.x0 = x0.const_data_ptr();
    args.x_t = x_t.const_data_ptr();
    args.model_output = model_output.const_data_ptr();
    args.t = t.const_data_ptr<int64_t>();
    args.table = table.const_data_ptr<float>();
    args.num_rows = table.size(0);
    set_noise(args, noise, keys, seed, stream, op);
    args.layout = sample_layout(x_t, channels_last);
    args.prediction = static_cast<Prediction>(prediction);
    args.learned = learned;
    args.clip = clip;
    args.detach_mean = detach_mean;
    args.noise_type = dtype_of(data_type, op, "x_t");
    args.output_type = dtype_of(output_type, op, "model_output");
  }
};

template <typename Device>
Tensor vlb_terms(const Tensor& x0, const Tensor& x_t, const Tensor& model_output, const Tensor& t,
                 const Tensor& table, const std::optional<Tensor>& noise,
                 const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
                 int64_t prediction, bool learned, bool clip, bool detach_mean) {
  const typename Device::Guard guard(x_t);
  VlbTermsCall call(x0, x_t, model_output, t, table, noise, keys, seed, stream, prediction, learned,
                    clip, detach_mean);
  Device::check_rows(call.t, call.args.num_rows, "vlb_terms", "t");
  Tensor out = empty_of({3, call.x_t.size(0)}, call.x_t, ScalarType::Float);
  if (out.numel() == 0) return out;
  const std::optional<Tensor> workspace = workspace_of(Device::workspace(call.args), call.x_t);
  call.args.out = out.mutable_data_ptr<float>();
  if (workspace) call.args.partials = workspace->mutable_data_ptr<float>();
  Device::vlb_terms(x_t, call.args);
  return out;
}

// The gradient of model_output.
template <typename Device>
Tensor vlb_terms_backward(const Tensor& grad, const Tensor& x0, const Tensor& x_t,
                          const Tensor& model_output, const Tensor& t, const Tensor& table,
                          const std::optional<Tensor>& noise, const std::optional<Tensor>& keys,
                          std::optional<int64_t> seed, int64_t stream, int64_t prediction,
                          bool learned, bool clip, bool detach_mean) {
  const typename Device::Guard guard(x_t);
  VlbTermsCall call(x0, x_t, model_output, t, table, noise, keys, seed, stream, prediction, learned,
                    clip, detach_mean);
  Device::check_rows(call.t, call.args.num_rows, "vlb_terms", "t");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == 3 && grad.size(1) == call.x_t.size(0) &&
                      grad.scalar_type() == ScalarType::Float && grad.device() == call.x_t.device(),
                  "vlb_terms: grad must be float32 (3, B) on the device of x_t");
  const Tensor grad_ready = in_format(grad, false);
  Tensor out = empty(call.model_output, call.model_output.scalar_type(), call.channels_last);
  if (out.numel() == 0) return out;
  call.args.grad = grad_ready.const_data_ptr<float>();
  call.args.grad_output = out.mutable_data_ptr();
  Device::vlb_terms_backward(x_t, call.args);
  return out;
}

}  // namespace fastdiff::bindings
