#pragma once

#include "fastdiff/layout.h"
#include "fastdiff/philox.h"

namespace fastdiff {

// The numbers are those of fastdiff/ops/eps_loss.py.
enum class LossKind : int32_t { kMse, kL1, kHuber };
enum class Reduction : int32_t { kNone, kMean, kSum };

// Loss of one element with error d = prediction - noise (docs/mathematics.md §6).
template <LossKind Kind, typename T>
FASTDIFF_HD T loss_term(T d) {
  if constexpr (Kind == LossKind::kMse) return d * d;
  const T a = d < T(0) ? -d : d;
  if constexpr (Kind == LossKind::kL1) return a;
  return a < T(1) ? T(0.5) * d * d : a - T(0.5);
}

// Its derivative; 0 at the kink of l1.
template <LossKind Kind, typename T>
FASTDIFF_HD T loss_slope(T d) {
  if constexpr (Kind == LossKind::kMse) return T(2) * d;
  if constexpr (Kind == LossKind::kL1) return d > T(0) ? T(1) : (d < T(0) ? T(-1) : T(0));
  return d > T(1) ? T(1) : (d < T(-1) ? T(-1) : d);
}

// The forward pass reads prediction, noise and weight and writes out; the backward pass reads grad
// too and writes the gradients that are not null. On the CPU the forward pass writes
// grad_prediction as well if it is not null, for grad = 1. weight, grad and out are float32, or
// float64 if the prediction is.
struct EpsLossArgs {
  void* out;              // (B,) for kNone, else one value
  void* partials;         // CUDA: float32 workspace
  void* grad_prediction;  // as prediction
  void* grad_noise;       // as noise
  const void* grad;       // as out
  const void* prediction;
  const void* noise;   // kGiven only
  const void* weight;  // (B,) or null
  NoiseSource source;  // kGenerated only
  SampleLayout layout;
  NoiseMode mode;
  LossKind kind;
  Reduction reduction;
  DType prediction_type;
  DType noise_type;  // kFloat32 or prediction_type

  // What the sum over a sample's elements is multiplied with, beside its weight.
  double scale() const {
    const double elements = static_cast<double>(layout.numel);
    return reduction == Reduction::kNone   ? 1.0 / elements
           : reduction == Reduction::kMean ? 1.0 / (elements * static_cast<double>(layout.batch))
                                           : 1.0;
  }
};

}  // namespace fastdiff
