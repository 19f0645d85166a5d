#pragma once

// One term of the variational bound, with the errors of x0 and eps (docs/mathematics.md §6).

#include "fastdiff/normal_tail.h"

namespace fastdiff {

// What one sample's elements need from its row of the table. Prediction and data are affine in each
// other:  x0^ = clip(x0_x x + x0_output output),  and eps is affine in x and output, or where x0^
// was clipped, in x and x0^.
struct VlbRow {
  StepRow<float> step;  // x0^ alone
  float eps_x, eps_output;
  float clipped_eps_x, clipped_eps_x0;
  float mean_x0;  // of the posterior's mean
  float log_variance, slope, posterior_log_variance;
  bool first;  // t = 0: the decoder
};

// `columns` is a row of the table, or null for a sample without one, whose results are NaN.
FASTDIFF_HD VlbRow vlb_row(const float* columns, bool first, Prediction prediction, bool clip) {
  const auto column = [&](StepColumn c) { return columns ? columns[c] : NAN; };
  VlbRow row;
  row.step = step_row<float>(columns, {prediction, EpsSource::kNone, clip});
  row.clipped_eps_x = column(kRecipSqrtOneMinusAlphaBar);
  row.clipped_eps_x0 = -column(kSignalToNoise);
  if (prediction == Prediction::kEps) {
    row.eps_x = 0.0f;
    row.eps_output = 1.0f;
  } else if (prediction == Prediction::kV) {
    row.eps_x = column(kSqrtOneMinusAlphaBar);
    row.eps_output = column(kSqrtAlphaBar);
  } else {
    row.eps_x = row.clipped_eps_x + row.clipped_eps_x0 * row.step.x0_x;
    row.eps_output = row.clipped_eps_x0 * row.step.x0_output;
  }
  row.mean_x0 = column(kCoefX0);
  row.log_variance = column(kLogVariance);
  row.slope = column(kLogVarianceSlope);
  row.posterior_log_variance = column(kPosteriorLogVariance);
  row.first = first;
  return row;
}

// 1 / sigma, and exp(w) - 1 - w with w the log of the posterior's variance over the model's: what
// an element needs from its variance channel, or all elements of a sample if the variance is fixed.
struct VlbVariance {
  float inverse_sigma, w, excess;
};

FASTDIFF_HD VlbVariance vlb_variance(const VlbRow& row, float v) {
  const float log_variance = row.log_variance + row.slope * v;
  const float w = row.posterior_log_variance - log_variance;
  return {exp_of(-0.5f * log_variance), w, exp_minus_linear(w)};
}

// The bin of x0: 256 levels in [-1, 1], the outer ones without an end.
FASTDIFF_HD BinTerm decoder_term(const VlbVariance& variance, float x0, float z) {
  const float edge = x0 > 0.999f ? 1.0f : (x0 < -0.999f ? -1.0f : 0.0f);
  return bin_term(z, variance.inverse_sigma * (1.0f / 255.0f), edge);
}

struct VlbElement {
  float z;          // posterior's mean - model's mean, over the model's sigma
  float x0_error;   // x0 - x0^
  float eps_error;  // noise - eps^
  float kept;  // 0 where the clip changed x0^, else 1; a bool would keep the structure in memory
};

FASTDIFF_HD VlbElement vlb_element(const VlbRow& row, const VlbVariance& variance, float x0,
                                   float x, float output, float noise) {
  const float raw = row.step.x0_x * x + row.step.x0_output * output;
  const float pred_x0 = step_x0(row.step, x, output);
  VlbElement e;
  e.kept = raw == pred_x0 ? 1.0f : 0.0f;
  e.x0_error = x0 - pred_x0;
  // The means differ in their x0 alone.
  e.z = row.mean_x0 * e.x0_error * variance.inverse_sigma;
  const float eps = raw == pred_x0 ? row.eps_x * x + row.eps_output * output
                                   : row.clipped_eps_x * x + row.clipped_eps_x0 * pred_x0;
  e.eps_error = noise - eps;
  return e;
}

// In nats: the Kullback-Leibler divergence, or with First the decoder's -log p(x0 | x_1).
template <bool First>
FASTDIFF_HD float vlb_nats(const VlbVariance& variance, const VlbElement& e, float x0) {
  if constexpr (First) {
    return decoder_term(variance, x0, e.z).nll;
  } else {
    return 0.5f * (variance.excess + e.z * e.z);
  }
}

// Gradients of a sample's three results, each over its number of elements; kl's is per nat.
struct VlbGradients {
  float kl, x0_mse, eps_mse;
  float mean;  // 1, or 0 if the prediction gets no gradient, only its variance channel
};

// Gradients of an element's prediction and of its variance channel.
struct VlbSlopes {
  float output, v;
};

template <bool First>
FASTDIFF_HD VlbSlopes vlb_slopes(const VlbRow& row, const VlbVariance& variance,
                                 const VlbGradients& grad, float x0, float x, float output,
                                 float noise) {
  const VlbElement e = vlb_element(row, variance, x0, x, output, noise);
  float slope_z = e.z;
  float slope_log_variance = -0.5f * (variance.excess + variance.w + e.z * e.z);
  if constexpr (First) {
    const BinTerm bin = decoder_term(variance, x0, e.z);
    slope_z = bin.slope_z;
    slope_log_variance = -0.5f * (e.z * bin.slope_z + bin.slope_h);
  }
  const float by_x0 =
      -(grad.kl * slope_z * row.mean_x0 * variance.inverse_sigma + 2.0f * grad.x0_mse * e.x0_error);
  const float by_eps = -2.0f * grad.eps_mse * e.eps_error;
  const float by_output = by_x0 * row.step.x0_output + by_eps * row.eps_output;
  return {by_output * e.kept * grad.mean, grad.kl * row.slope * slope_log_variance};
}

// The forward pass writes out; the backward pass reads grad too and writes grad_output.
struct VlbTermsArgs {
  float* out;         // (3, B): kl in bits per element, mean squared errors of x0 and eps
  float* partials;    // CUDA: workspace
  void* grad_output;  // as model_output
  const float* grad;  // as out
  const void* x0;
  const void* x_t;
  const void* model_output;
  const void* noise;   // kGiven only
  const int64_t* t;    // (B,)
  const float* table;  // (num_rows, kStepColumns)
  int64_t num_rows;
  NoiseSource source;   // kGenerated only
  SampleLayout layout;  // of x_t
  NoiseMode mode;
  Prediction prediction;
  int32_t learned;  // model_output has 2C channels
  int32_t clip;
  int32_t detach_mean;
  DType noise_type;   // of x0, x_t and noise
  DType output_type;  // of model_output and grad_output

  FASTDIFF_HD VlbRow row(int64_t sample) const {
    const int64_t i = t[sample];
    const bool valid = i >= 0 && i < num_rows;
    return vlb_row(valid ? table + i * kStepColumns : nullptr, i == 0, prediction, clip != 0);
  }
  FASTDIFF_HD VlbGradients gradients(int64_t sample) const {
    const float scale = 1.0f / static_cast<float>(layout.numel);
    return {scale * kBitsPerNat * grad[sample], scale * grad[layout.batch + sample],
            scale * grad[2 * layout.batch + sample], detach_mean ? 0.0f : 1.0f};
  }

  static constexpr float kBitsPerNat = 1.44269504f;

  // Elements of the model output from its start to the sample's mean channels, and from an element
  // of those to the same one of the variance channels.
  FASTDIFF_HD int64_t output_base(int64_t sample) const {
    return sample * layout.numel * (learned ? 2 : 1);
  }
  FASTDIFF_HD int64_t variance_offset() const {
    return layout.inner == 1 ? layout.numel : layout.inner;
  }
  // Whether the mean channels of a sample do not lie together: pixel after pixel, 2C channels each.
  FASTDIFF_HD bool output_strided() const { return learned && layout.inner > 1; }
};

}  // namespace fastdiff
