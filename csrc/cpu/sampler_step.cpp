#include "fastdiff/sampler_step.h"

#include "bfloat16.h"
#include "elementwise.h"
#include "heads.h"
#include "kernels.h"
#include "simd.h"

namespace fastdiff::cpu {
namespace {

// These loops work on tiles in the L1 cache, where adding the noise in a second pass costs little;
// memory is read and written once.

// uncond is read if Guided, x0 is written if WithX0.
template <bool Guided, bool WithX0, typename T>
FASTDIFF_HD void step_all(const StepRow<T> row, T scale, const T* x, const T* cond, const T* uncond,
                          T* x_s, T* x0, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T output = Guided ? guided(cond[i], uncond[i], scale) : cond[i];
    const T predicted = step_x0(row, x[i], output);
    x_s[i] = step_mean(row, x[i], output, predicted);
    if (WithX0) x0[i] = predicted;
  }
}

template <typename T>
FASTDIFF_HD void add_noise(const StepRow<T> row, const T* noise, T* x_s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x_s[i] += row.sigma * noise[i];
}

template <typename T>
FASTDIFF_HD void add_learned_noise(const StepRow<T> row, const T* v, const T* noise, T* x_s,
                                   int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x_s[i] += step_sigma(row, v[i]) * noise[i];
}

// All arrays in bfloat16 and no noise: two values to a word, so that nothing is widened or packed.
// The general path converts tile by tile, which takes longer than memory does.
template <bool Guided>
FASTDIFF_HD void step_pairs(const StepRow<float> row, float scale, const uint16_t* x,
                            const uint16_t* cond, const uint16_t* uncond, uint16_t* x_s,
                            int64_t n) {
  const auto next = [&](float value, float output, float other) {
    if constexpr (Guided) output = guided(output, other, scale);
    return step_mean(row, value, output, step_x0(row, value, output));
  };
  const Pair* __restrict x_pairs = reinterpret_cast<const Pair*>(x);
  const Pair* __restrict cond_pairs = reinterpret_cast<const Pair*>(cond);
  const Pair* __restrict uncond_pairs = reinterpret_cast<const Pair*>(uncond);
  Pair* __restrict out_pairs = reinterpret_cast<Pair*>(x_s);
#pragma omp simd
  for (int64_t i = 0; i < n / 2; ++i) {
    const uint32_t value = x_pairs[i], output = cond_pairs[i];
    const uint32_t other = Guided ? uncond_pairs[i] : output;
    out_pairs[i] = bfloat16_pair(next(low(value), low(output), low(other)),
                                 next(high(value), high(output), high(other)));
  }
  if (n % 2) {
    const int64_t i = n - 1;
    const float y = next(low(x[i]), low(cond[i]), Guided ? low(uncond[i]) : 0.0f);
    x_s[i] = static_cast<uint16_t>(round_to_bfloat16(y) >> 16);
  }
}

void sampler_step_double(const SamplerStepArgs& args) {
  const SampleLayout& layout = args.layout;
  const int64_t size = tile_elements(layout);
  for_each_tile(layout, 8192, [&](int64_t sample, int64_t first, int64_t n) {
    const int64_t offset = sample * layout.numel + first;
    const StepRow<double> row = step_row<double>(args.columns(sample), args.options());
    double* buffers = reinterpret_cast<double*>(thread_scratch(2 * 4 * size));
    double* v_buffer = buffers + size;
    // The mean channels of the tile and, if asked for, its variance channels.
    const auto heads = [&](const void* base, double* buffer, const double** v) {
      const double* in = static_cast<const double*>(base) + args.output_base(sample);
      if (!args.output_strided()) {
        if (v) *v = in + args.variance_offset() + first;
        return in + first;
      }
      split_heads(in + 2 * first, layout.inner, n, buffer, v ? v_buffer : nullptr);
      if (v) *v = v_buffer;
      return static_cast<const double*>(buffer);
    };
    const double* v = nullptr;
    const double* cond = heads(args.model_output, buffers, args.learned ? &v : nullptr);
    const double* uncond = args.uncond ? heads(args.uncond, buffers + 2 * size, nullptr) : nullptr;
    const double* x = static_cast<const double*>(args.x_t) + offset;
    double* x_s = static_cast<double*>(args.x_s) + offset;
    double* x0 = args.pred_x0 ? static_cast<double*>(args.pred_x0) + offset : buffers + 3 * size;
    const auto function = uncond ? step_all<true, true, double> : step_all<false, true, double>;
    function(row, args.guidance_scale, x, cond, uncond, x_s, x0, n);
    if (args.mode == NoiseMode::kNone) return;
    const double* noise = static_cast<const double*>(args.noise) + offset;
    if (v) {
      add_learned_noise(row, v, noise, x_s, n);
    } else {
      add_noise(row, noise, x_s, n);
    }
  });
}

}  // namespace

void sampler_step(const SamplerStepArgs& args) {
  if (args.x_type == DType::kFloat64) return sampler_step_double(args);

  const SampleLayout& layout = args.layout;
  const int64_t size = tile_elements(layout);
  const bool generated = args.mode == NoiseMode::kGenerated;
  const bool stream = layout.batch * layout.numel * size_of(args.x_type) > kStreamBytes;
  const bool in_place = args.x_type == DType::kFloat32 && !stream;
  const float scale = static_cast<float>(args.guidance_scale);
  const bool all_bfloat16 = args.x_type == DType::kBFloat16 &&
                            args.output_type == DType::kBFloat16 && !args.pred_x0 &&
                            args.mode == NoiseMode::kNone && !args.output_strided();
  const auto function = args.uncond ? (args.pred_x0 ? clones<step_all<true, true, float>>
                                                    : clones<step_all<true, false, float>>)
                                    : (args.pred_x0 ? clones<step_all<false, true, float>>
                                                    : clones<step_all<false, false, float>>);

  for_each_tile(layout, generated ? 4096 : 16384, [&](int64_t sample, int64_t first, int64_t n) {
    const int64_t offset = sample * layout.numel + first;
    const StepRow<float> row = step_row<float>(args.columns(sample), args.options());
    if (all_bfloat16) {
      const auto at = [&](const void* base, int64_t start) {
        return static_cast<const uint16_t*>(base) + start + first;
      };
      uint16_t* out = static_cast<uint16_t*>(args.x_s) + offset;
      uint16_t* result = stream ? reinterpret_cast<uint16_t*>(thread_scratch(size)) : out;
      const uint16_t* x = at(args.x_t, sample * layout.numel);
      const uint16_t* cond = at(args.model_output, args.output_base(sample));
      if (args.uncond) {
        const uint16_t* uncond = at(args.uncond, args.output_base(sample));
        clones<step_pairs<true>>(row, scale, x, cond, uncond, result, n);
      } else {
        clones<step_pairs<false>>(row, scale, x, cond, nullptr, result, n);
      }
      if (stream) stream_bytes(out, result, 2 * n);
      return;
    }
    // x_t and x_s, x0, cond, uncond, v; two tiles for pixels with both heads; noise.
    float* buffers = thread_scratch(7 * size + normal_scratch(layout));
    float* v_buffer = buffers + 4 * size;
    float* both_heads = buffers + 5 * size;

    // The mean channels of the tile and, if asked for, its variance channels.
    const auto heads = [&](const void* base, float* buffer, const float** v) {
      const int64_t start = args.output_base(sample);
      if (!args.output_strided()) {
        if (v) {
          *v = load_tile(args.output_type, base, start + args.variance_offset() + first, n,
                         v_buffer);
        }
        return load_tile(args.output_type, base, start + first, n, buffer);
      }
      const float* in = load_tile(args.output_type, base, start + 2 * first, 2 * n, both_heads);
      split_heads(in, layout.inner, n, buffer, v ? v_buffer : nullptr);
      if (v) *v = v_buffer;
      return static_cast<const float*>(buffer);
    };
    const float* v = nullptr;
    const float* cond = heads(args.model_output, buffers + 2 * size, args.learned ? &v : nullptr);
    const float* uncond = args.uncond ? heads(args.uncond, buffers + 3 * size, nullptr) : nullptr;

    const float* x = load_tile(args.x_type, args.x_t, offset, n, buffers);
    float* x_s = in_place ? static_cast<float*>(args.x_s) + offset : buffers;
    float* x0 =
        in_place && args.pred_x0 ? static_cast<float*>(args.pred_x0) + offset : buffers + size;
    function(row, scale, x, cond, uncond, x_s, x0, n);
    if (args.mode != NoiseMode::kNone) {
      const float* noise = generated
                               ? normal_tile(layout, args.source.key(sample), args.source.stream,
                                             first, n, buffers + 7 * size)
                               : load_tile(args.x_type, args.noise, offset, n, buffers + 7 * size);
      if (v) {
        clones<add_learned_noise<float>>(row, v, noise, x_s, n);
      } else {
        clones<add_noise<float>>(row, noise, x_s, n);
      }
    }
    if (in_place) return;
    store_tile(args.x_type, args.x_s, offset, n, x_s, stream);
    if (args.pred_x0) store_tile(args.x_type, args.pred_x0, offset, n, x0, stream);
  });
}

}  // namespace fastdiff::cpu
