#pragma once

// Probabilities of a discretized normal in log space, with their slopes (docs/mathematics.md §6).
//
// Nothing here calls libm, so that the CPU compiler vectorizes it, and every branch is a selection.

#include "fastdiff/sampler_step.h"

namespace fastdiff {

// exp(w) - 1 - w, within 2e-6 of itself: around 0, where those terms cancel, from its own series.
FASTDIFF_HD float exp_minus_linear(float w) {
  float p = 1.9857802e-4f;
  p = p * w + 1.3933604e-3f;
  p = p * w + 8.3333607e-3f;
  p = p * w + 4.1666465e-2f;
  p = p * w + 1.6666667e-1f;
  p = p * w + 0.5f;
  const float magnitude = w < 0.0f ? -w : w;
  return magnitude < 0.3466f ? w * w * p : exp_of(w) - 1.0f - w;
}

// -log(1 - s) for 0 <= s < 1: the logarithm of the rounded 1 - s, corrected by what the rounding
// did to s.
FASTDIFF_HD float minus_log1m(float s) {
  const float u = 1.0f - s, kept = 1.0f - u;
  return kept == 0.0f ? s : -log_positive(u) * (s / kept);
}

// The tail probability of a standard normal beyond x >= 0, times exp(x^2 / 2): half of
// erfcx(x / sqrt(2)), within 4e-7 of itself for all x.
FASTDIFF_HD float scaled_tail(float x) {
  const float t = 1.0f / (1.0f + 0.25f * x);
  float p = 0.019781969f;
  p = p * t - 0.080877136f;
  p = p * t + 0.095596768f;
  p = p * t - 0.031717215f;
  p = p * t + 0.063698937f;
  p = p * t + 0.058975207f;
  p = p * t + 0.081603098f;
  p = p * t + 0.093466356f;
  p = p * t + 0.099736432f;
  p = p * t + 0.099735567f;
  return p * t;
}

struct BinTerm {
  float nll;      // -log of the probability
  float slope_z;  // its derivative by z
  float slope_h;  // h times its derivative by h
};

// -log P(|Z - z| < h) for a standard normal Z: a bin of half-width h whose center is z away from
// the mean. With edge 1 the bin has no upper end, with edge -1 no lower end.
//
// Far from the mean P is the difference of the tails Q at both ends on that side, scaled by the
// density at the nearer end, never of two numbers near 1. A narrow bin is the density times its
// width and the series of its mean over the bin, in h^2 and (z h)^2.
FASTDIFF_HD BinTerm bin_term(float z, float h, float edge) {
  constexpr float kInvSqrt2Pi = 0.398942280f, kLogSqrt2Pi = 0.918938533f;
  const bool inner = edge == 0.0f;
  const float m = z < 0.0f ? -z : z;
  const float side = inner ? (z < 0.0f ? -1.0f : 1.0f) : edge;
  const float y = m * h, h2 = h * h;

  // The nearer end a, negative if the mean is inside the bin, and the farther one m + h.
  const float a = side * z - h;
  const bool inside = a < 0.0f;
  const float distance = inside ? -a : a;
  const float half_square = 0.5f * distance * distance;
  const float decay = inner ? exp_of(-2.0f * y) : 0.0f;  // of the density between the ends
  const float tail = scaled_tail(distance), far_tail = decay * scaled_tail(m + h);
  const float density = exp_of(-half_square);
  const float outside_mass = density * (tail + far_tail);
  const float mass = inside ? 1.0f - outside_mass : tail - far_tail;
  const float ratio = kInvSqrt2Pi * (inside ? density : 1.0f) / mass;  // density at a over P
  const float nll = inside ? minus_log1m(outside_mass) : half_square - log_positive(mass);

  const float y2 = y * y;
  float series = y2 * y2 * (y2 - 15.0f * h2) + h2 * h2 * (45.0f * y2 - 15.0f * h2);
  series = series * (1.0f / 5040.0f) + (y2 * (y2 - 6.0f * h2) + 3.0f * h2 * h2) * (1.0f / 120.0f);
  series = series + (y2 - h2) * (1.0f / 6.0f) + 1.0f;
  const float scale = exp_of(-0.5f * h2) / series;
  const float sinhc = 1.0f + y2 * (1.0f / 6.0f + y2 * (1.0f / 120.0f + y2 * (1.0f / 5040.0f)));
  const float cosh = 1.0f + y2 * (0.5f + y2 * (1.0f / 24.0f + y2 * (1.0f / 720.0f)));
  const bool narrow = inner && h < 0.3f && y < 0.5f;

  BinTerm term;
  term.nll = narrow ? 0.5f * m * m + kLogSqrt2Pi - log_positive(2.0f * h * series) : nll;
  term.slope_z = narrow ? z * sinhc * scale : side * ratio * (1.0f - decay);
  term.slope_h = narrow ? -cosh * scale : -h * ratio * (1.0f + decay);
  return term;
}

}  // namespace fastdiff
