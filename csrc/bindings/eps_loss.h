#pragma once

#include <tuple>

#include "fastdiff/eps_loss.h"

#include "tensors.h"

namespace fastdiff::bindings {

// The arguments of both passes, checked and brought into one memory format; owns what they point
// to.
struct EpsLossCall {
  EpsLossArgs args{};
  Tensor prediction;
  std::optional<Tensor> noise, keys, weight;
  ScalarType compute;  // of the loss, its gradient and the weights
  bool channels_last;

  EpsLossCall(const Tensor& prediction_in, const std::optional<Tensor>& noise_in,
              const std::optional<Tensor>& keys_in, std::optional<int64_t> seed, int64_t stream,
              const std::optional<Tensor>& weight_in, int64_t reduction, int64_t kind)
      : prediction(prediction_in) {
    constexpr const char* op = "eps_loss";
    STD_TORCH_CHECK(prediction.dim() >= 1, op, ": prediction must have shape (B, ...)");
    check_float(prediction, op, "prediction");
    STD_TORCH_CHECK(noise_in.has_value() + keys_in.has_value() + seed.has_value() == 1, op,
                    ": pass one of noise, keys and seed");
    STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, op, ": reduction must be 0, 1 or 2");
    STD_TORCH_CHECK(kind >= 0 && kind <= 2, op, ": kind must be 0, 1 or 2");
    const ScalarType type = prediction.scalar_type();
    const bool wide = type == ScalarType::Double;
    STD_TORCH_CHECK(!wide || (prediction.is_cpu() && noise_in), op,
                    ": float64 kernels exist on the CPU only, and for given noise only");
    compute = wide ? ScalarType::Double : ScalarType::Float;
    channels_last = is_channels_last(prediction);
    prediction = in_format(prediction, channels_last);
    if (noise_in) {
      check_same_shape(*noise_in, prediction, op, "noise");
      check_float(*noise_in, op, "noise");
      const bool keep = noise_in->scalar_type() == type;
      noise = in_format(keep ? *noise_in : converted(*noise_in, compute), channels_last);
    }
    keys = checked_keys(keys_in, prediction, op);
    if (weight_in) weight = values(*weight_in, false, "weight");

    args.prediction = prediction.const_data_ptr();
    args.weight = weight ? weight->const_data_ptr() : nullptr;
    set_noise(args, noise, keys, seed, stream, op);
    args.layout = sample_layout(prediction, channels_last);
    args.kind = static_cast<LossKind>(kind);
    args.reduction = static_cast<Reduction>(reduction);
    args.prediction_type = dtype_of(type, op, "prediction");
  }

  // One value per sample, or a single one, in the compute type.
  Tensor values(const Tensor& x, bool single, const char* name) const {
    constexpr const char* op = "eps_loss";
    if (single) {
      STD_TORCH_CHECK(x.dim() == 0 && x.device() == prediction.device(), op, ": ", name,
                      " must have shape () on the device of prediction");
    } else {
      check_vector(x, prediction.size(0), x.scalar_type(), prediction, op, name);
    }
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                    op, ": ", name, " must be float32 or float64");
    const Tensor ready = x.scalar_type() == compute ? x : converted(x, compute);
    return in_format(ready, false);
  }
};

template <typename Device>
Tensor eps_loss(const Tensor& prediction, const std::optional<Tensor>& noise,
                const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
                const std::optional<Tensor>& weight, int64_t reduction, int64_t kind) {
  const typename Device::Guard guard(prediction);
  EpsLossCall call(prediction, noise, keys, seed, stream, weight, reduction, kind);
  const bool per_sample = call.args.reduction == Reduction::kNone;
  Tensor out =
      empty_of(per_sample ? std::vector<int64_t>{prediction.size(0)} : std::vector<int64_t>{},
               prediction, call.compute);
  if (out.numel() == 0) return out;
  const std::optional<Tensor> workspace = workspace_of(Device::workspace(call.args), prediction);
  if (workspace) call.args.partials = workspace->mutable_data_ptr();
  call.args.out = out.mutable_data_ptr();
  Device::eps_loss(prediction, call.args);
  return out;
}

// The loss and the gradient of the prediction for a gradient of the loss of 1, in one pass: what
// `loss.backward()` needs. CPU only, and not in float64.
template <typename Device>
std::tuple<Tensor, Tensor> eps_loss_with_gradient(const Tensor& prediction,
                                                  const std::optional<Tensor>& noise,
                                                  const std::optional<Tensor>& keys,
                                                  std::optional<int64_t> seed, int64_t stream,
                                                  const std::optional<Tensor>& weight,
                                                  int64_t reduction, int64_t kind) {
  EpsLossCall call(prediction, noise, keys, seed, stream, weight, reduction, kind);
  STD_TORCH_CHECK(call.args.reduction != Reduction::kNone && call.compute == ScalarType::Float,
                  "eps_loss: the gradient comes with a single loss, in float32");
  Tensor out = empty_of({}, prediction, call.compute);
  Tensor gradient = empty(call.prediction, prediction.scalar_type(), call.channels_last);
  call.args.out = out.mutable_data_ptr();
  call.args.grad_prediction = prediction.numel() > 0 ? gradient.mutable_data_ptr() : nullptr;
  Device::eps_loss(prediction, call.args);
  return {out, gradient};
}

// The gradients of prediction and noise; (0,) tensors for those not asked for.
template <typename Device>
std::tuple<Tensor, Tensor> eps_loss_backward(const Tensor& grad, const Tensor& prediction,
                                             const std::optional<Tensor>& noise,
                                             const std::optional<Tensor>& keys,
                                             std::optional<int64_t> seed, int64_t stream,
                                             const std::optional<Tensor>& weight, int64_t reduction,
                                             int64_t kind, bool need_prediction, bool need_noise) {
  const typename Device::Guard guard(prediction);
  EpsLossCall call(prediction, noise, keys, seed, stream, weight, reduction, kind);
  STD_TORCH_CHECK(!need_noise || noise, "eps_loss: generated noise has no gradient");
  const Tensor grad_ready = call.values(grad, call.args.reduction != Reduction::kNone, "grad");
  const auto output = [&](bool needed, const Tensor& like) {
    return needed ? empty(call.prediction, like.scalar_type(), call.channels_last)
                  : empty_of({0}, prediction, like.scalar_type());
  };
  Tensor grad_prediction = output(need_prediction, call.prediction);
  Tensor grad_noise = output(need_noise, call.noise ? *call.noise : call.prediction);
  if (prediction.numel() > 0 && (need_prediction || need_noise)) {
    call.args.grad = grad_ready.const_data_ptr();
    call.args.grad_prediction = need_prediction ? grad_prediction.mutable_data_ptr() : nullptr;
    call.args.grad_noise = need_noise ? grad_noise.mutable_data_ptr() : nullptr;
    Device::eps_loss_backward(prediction, call.args);
  }
  if (noise && grad_noise.scalar_type() != noise->scalar_type()) {
    grad_noise = converted(grad_noise, noise->scalar_type());
  }
  return {grad_prediction, grad_noise};
}

}  // namespace fastdiff::bindings
