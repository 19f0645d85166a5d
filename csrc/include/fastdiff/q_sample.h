#pragma once

#include "fastdiff/layout.h"
#include "fastdiff/philox.h"

namespace fastdiff {

// x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (DDPM eq. 4, docs/mathematics.md §3).
template <typename T>
FASTDIFF_HD T q_sample(T sqrt_alpha_bar, T sqrt_one_minus_alpha_bar, T x0, T noise) {
  return sqrt_alpha_bar * x0 + sqrt_one_minus_alpha_bar * noise;
}

// Level 0..255 to a pixel in [-1, 1]; both ends are exact.
FASTDIFF_HD float pixel_from_uint8(uint8_t level) {
  return static_cast<float>(2 * static_cast<int32_t>(level) - 255) * (1.0f / 255.0f);
}

struct QSampleArgs {
  void* out;
  const void* x0;
  const void* noise;                      // kGiven only
  const int64_t* t;                       // (B,)
  const float* sqrt_alpha_bar;            // (T,)
  const float* sqrt_one_minus_alpha_bar;  // (T,)
  const bool* flip;                       // (B,) or null
  int64_t num_timesteps;
  NoiseSource source;  // kGenerated only
  SampleLayout layout;
  NoiseMode mode;  // kNone: the mean sqrt(abar_t) x0 alone, which is also either gradient
  DType out_type;
  DType x0_type;     // kUInt8, kFloat32 or out_type
  DType noise_type;  // kFloat32 or out_type
};

}  // namespace fastdiff
