#include "fastdiff/q_sample.h"

#include "bfloat16.h"
#include "elementwise.h"
#include "kernels.h"
#include "simd.h"

namespace fastdiff::cpu {
namespace {

FASTDIFF_HD void noised_loop(float a, float b, const float* x0, const float* noise, float* out,
                             int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fastdiff::q_sample(a, b, x0[i], noise[i]);
}
constexpr auto noised = clones<noised_loop>;

FASTDIFF_HD void scaled_loop(float a, const float* x0, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = a * x0[i];
}
constexpr auto scaled = clones<scaled_loop>;

// All three arrays in bfloat16: a word holds two values, so that nothing is widened or packed. The
// general path converts tile by tile and takes three times as long, more than memory does.
FASTDIFF_HD void noised_bfloat16_loop(float a, float b, const uint16_t* x0, const uint16_t* noise,
                                      uint16_t* out, int64_t n) {
  const Pair* __restrict x_pairs = reinterpret_cast<const Pair*>(x0);
  const Pair* __restrict noise_pairs = reinterpret_cast<const Pair*>(noise);
  Pair* __restrict out_pairs = reinterpret_cast<Pair*>(out);
#pragma omp simd
  for (int64_t i = 0; i < n / 2; ++i) {
    const uint32_t x = x_pairs[i], z = noise_pairs[i];
    out_pairs[i] = bfloat16_pair(fastdiff::q_sample(a, b, low(x), low(z)),
                                 fastdiff::q_sample(a, b, high(x), high(z)));
  }
  if (n % 2) {
    const float y = fastdiff::q_sample(a, b, low(x0[n - 1]), low(noise[n - 1]));
    out[n - 1] = static_cast<uint16_t>(round_to_bfloat16(y) >> 16);
  }
}
constexpr auto noised_bfloat16 = clones<noised_bfloat16_loop>;

// Mirrored samples are gathered pixel by pixel; the conversion is that of load_tile.
const float* load_flipped(const QSampleArgs& args, int64_t sample, int64_t first, int64_t n,
                          float* buffer) {
  const SampleLayout& layout = args.layout;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t source = sample * layout.numel + layout.flipped_index(first + i);
    buffer[i] = *load_tile(args.x0_type, args.x0, source, 1, buffer + i);
  }
  return buffer;
}

void q_sample_double(const QSampleArgs& args) {
  const SampleLayout& layout = args.layout;
  for_each_tile(layout, 8192, [&](int64_t sample, int64_t first, int64_t n) {
    const double a = args.sqrt_alpha_bar[args.t[sample]];
    const double b = args.sqrt_one_minus_alpha_bar[args.t[sample]];
    const bool flip = args.flip && args.flip[sample];
    const double* x0 = static_cast<const double*>(args.x0) + sample * layout.numel;
    const double* noise =
        args.noise ? static_cast<const double*>(args.noise) + sample * layout.numel : nullptr;
    double* out = static_cast<double*>(args.out) + sample * layout.numel;
    for (int64_t i = first; i < first + n; ++i) {
      const double x = x0[flip ? layout.flipped_index(i) : i];
      out[i] = noise ? fastdiff::q_sample(a, b, x, noise[i]) : a * x;
    }
  });
}

}  // namespace

void q_sample(const QSampleArgs& args) {
  if (args.out_type == DType::kFloat64) return q_sample_double(args);

  const SampleLayout& layout = args.layout;
  const int64_t size = tile_elements(layout);
  const bool generated = args.mode == NoiseMode::kGenerated;
  const bool stream = layout.batch * layout.numel * size_of(args.out_type) > kStreamBytes;
  const bool in_place = args.out_type == DType::kFloat32 && !stream;
  const bool all_bfloat16 = args.mode == NoiseMode::kGiven && args.out_type == DType::kBFloat16 &&
                            args.x0_type == DType::kBFloat16 && args.noise_type == DType::kBFloat16;

  for_each_tile(layout, generated ? 4096 : 16384, [&](int64_t sample, int64_t first, int64_t n) {
    const float a = args.sqrt_alpha_bar[args.t[sample]];
    const float b = args.sqrt_one_minus_alpha_bar[args.t[sample]];
    const int64_t offset = sample * layout.numel + first;
    const bool flip = args.flip && args.flip[sample];
    if (all_bfloat16 && !flip) {
      uint16_t* out = static_cast<uint16_t*>(args.out) + offset;
      uint16_t* result = stream ? reinterpret_cast<uint16_t*>(thread_scratch(size)) : out;
      noised_bfloat16(a, b, static_cast<const uint16_t*>(args.x0) + offset,
                      static_cast<const uint16_t*>(args.noise) + offset, result, n);
      if (stream) stream_bytes(out, result, 2 * n);
      return;
    }
    float* x0_buffer = thread_scratch(2 * size + normal_scratch(layout));
    float* noise_buffer = x0_buffer + 2 * size;
    float* result = in_place ? static_cast<float*>(args.out) + offset : x0_buffer + size;

    const float* x0 = flip ? load_flipped(args, sample, first, n, x0_buffer)
                           : load_tile(args.x0_type, args.x0, offset, n, x0_buffer);
    if (args.mode == NoiseMode::kNone) {
      scaled(a, x0, result, n);
    } else {
      const float* noise = noise_tile(args, sample, first, n, noise_buffer);
      noised(a, b, x0, noise, result, n);
    }
    if (!in_place) store_tile(args.out_type, args.out, offset, n, result, stream);
  });
}

}  // namespace fastdiff::cpu
