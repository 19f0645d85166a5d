#pragma once

// One step of a sampler, for ddim_step and ddpm_step (docs/mathematics.md §7).

#include "fastdiff/layout.h"
#include "fastdiff/philox.h"

namespace fastdiff {

// The numbers are those of fastdiff/reference/step_columns.py.
enum class Prediction : int32_t { kEps, kX0, kV, kMean };

// Columns of a step table; fastdiff/reference/step_columns.py says what they are.
enum StepColumn {
  kSqrtAlphaBar,
  kSqrtOneMinusAlphaBar,
  kRecipSqrtAlphaBar,
  kNoiseToSignal,
  kRecipSqrtOneMinusAlphaBar,
  kSignalToNoise,
  kX0FromMean,
  kX0FromMeanXT,
  kCoefX0,
  kCoefXT,
  kCoefEps,
  kSigma,
  kLogVariance,
  kLogVarianceSlope,
  kPosteriorLogVariance,
  kTimestep,
  kStepColumns
};

// Where the eps of a step comes from.
enum class EpsSource : int32_t {
  kNone,         // the step has no eps term: ddpm_step
  kOutput,       // the network's output: eps itself, or v
  kX0,           // the x0 of the step, clipped if that is clipped
  kUnclippedX0,  // the x0 before clipping
};

struct StepOptions {
  Prediction prediction;
  EpsSource eps;
  bool clip;
};

// A step of one sample, collapsed to two affine maps around the clip: with output the (guided)
// model output,
//   x0 = clip(x0_x x + x0_output output),
//   x_s = next_x x + next_x0 x0 + next_output output + sigma exp(half_slope v) z.
template <typename T>
struct StepRow {
  T x0_x, x0_output, limit;
  T next_x, next_x0, next_output;
  T sigma, half_slope;
};

// `columns` is a row of the table, or null for a sample without one, whose results are NaN.
template <typename T>
FASTDIFF_HD StepRow<T> step_row(const float* columns, const StepOptions& options) {
  const auto column = [&](StepColumn c) { return columns ? T(columns[c]) : T(NAN); };
  const T coef_eps = options.eps == EpsSource::kNone ? T(0) : column(kCoefEps);
  const bool v = options.prediction == Prediction::kV;

  StepRow<T> row;
  row.x0_x = options.prediction == Prediction::kEps    ? column(kRecipSqrtAlphaBar)
             : v                                       ? column(kSqrtAlphaBar)
             : options.prediction == Prediction::kMean ? -column(kX0FromMeanXT)
                                                       : T(0);
  row.x0_output = options.prediction == Prediction::kEps    ? -column(kNoiseToSignal)
                  : v                                       ? -column(kSqrtOneMinusAlphaBar)
                  : options.prediction == Prediction::kMean ? column(kX0FromMean)
                                                            : T(1);
  row.limit = options.clip ? T(1) : T(INFINITY);
  row.next_x = column(kCoefXT);
  row.next_x0 = column(kCoefX0);
  row.next_output = T(0);
  if (options.eps == EpsSource::kOutput) {
    row.next_output = v ? coef_eps * column(kSqrtAlphaBar) : coef_eps;
    if (v) row.next_x += coef_eps * column(kSqrtOneMinusAlphaBar);
  } else if (options.eps != EpsSource::kNone) {
    // eps = x / s - (a / s) x0
    const T eps_x0 = coef_eps * column(kSignalToNoise);
    row.next_x += coef_eps * column(kRecipSqrtOneMinusAlphaBar);
    if (options.eps == EpsSource::kX0) {
      row.next_x0 -= eps_x0;
    } else {
      row.next_x -= eps_x0 * row.x0_x;
      row.next_output = -eps_x0 * row.x0_output;
    }
  }
  row.sigma = column(kSigma);
  row.half_slope = T(0.5) * column(kLogVarianceSlope);
  return row;
}

// uncond + scale (cond - uncond).
template <typename T>
FASTDIFF_HD T guided(T cond, T uncond, T scale) {
  return uncond + scale * (cond - uncond);
}

// Predicted x0; NaN stays NaN.
template <typename T>
FASTDIFF_HD T step_x0(const StepRow<T>& row, T x, T output) {
  const T x0 = row.x0_x * x + row.x0_output * output;
  const T high = x0 > row.limit ? row.limit : x0;
  return high < -row.limit ? -row.limit : high;
}

// The step without its noise. An infinite output whose x0 is clipped does no harm: where the output
// enters through x0 alone it is not multiplied with zero.
template <typename T>
FASTDIFF_HD T step_mean(const StepRow<T>& row, T x, T output, T x0) {
  const T mean = row.next_x * x + row.next_x0 * x0;
  return row.next_output == T(0) ? mean : mean + row.next_output * output;
}

// exp(x) to 1.3 ulps (measured over [-87, 88], beyond which it stays at the end): x = n ln 2 + r
// with |r| <= ln 2 / 2, ln 2 in two parts, exp(r) a polynomial. NaN stays NaN.
FASTDIFF_HD float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 2^23: the integer is in the low bits
  const float n = shifted - 12582912.0f;
  float r = n * -0.693359375f + x;
  r = n * 2.12194440e-4f + r;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return p * bits_to_float((float_to_bits(shifted) << 23) + 0x3F800000u);
}
inline double exp_of(double x) { return std::exp(x); }

// Standard deviation of an element with variance channel v.
template <typename T>
FASTDIFF_HD T step_sigma(const StepRow<T>& row, T v) {
  return row.sigma * exp_of(row.half_slope * v);
}

struct SamplerStepArgs {
  void* x_s;
  void* pred_x0;  // or null
  const void* x_t;
  const void* model_output;
  const void* uncond;   // or null
  const void* noise;    // kGiven only
  const int64_t* step;  // (B,)
  const float* table;   // (num_rows, kStepColumns)
  int64_t num_rows;
  double guidance_scale;
  NoiseSource source;   // kGenerated only
  SampleLayout layout;  // of x_t
  NoiseMode mode;
  Prediction prediction;
  EpsSource eps;
  int32_t clip;
  int32_t two_heads;  // model_output and uncond have 2C channels
  int32_t learned;    // the second half of model_output's is the variance
  DType x_type;       // of x_s, pred_x0, x_t, noise
  DType output_type;  // of model_output, uncond

  // Null for a step outside the table.
  FASTDIFF_HD const float* columns(int64_t sample) const {
    const int64_t row = step[sample];
    return row >= 0 && row < num_rows ? table + row * kStepColumns : nullptr;
  }
  FASTDIFF_HD StepOptions options() const { return {prediction, eps, clip != 0}; }

  // Elements of the model output from its start to the sample's mean channels, and from an element
  // of those to the same one of the variance channels.
  FASTDIFF_HD int64_t output_base(int64_t sample) const {
    return sample * layout.numel * (two_heads ? 2 : 1);
  }
  FASTDIFF_HD int64_t variance_offset() const {
    return layout.inner == 1 ? layout.numel : layout.inner;
  }
  // Whether the mean channels of a sample do not lie together: pixel after pixel, 2C channels each.
  FASTDIFF_HD bool output_strided() const { return two_heads && layout.inner > 1; }
};

}  // namespace fastdiff
