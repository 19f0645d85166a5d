#include "fastdiff/sampler_step.h"

#include "elementwise.h"
#include "heads.h"
#include "kernels.h"
#include "simd.h"

namespace fastdiff::cpu {
namespace {

template <typename T>
FASTDIFF_HD void guide_all(T scale, const T* cond, const T* uncond, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = guided(cond[i], uncond[i], scale);
}

template <typename T>
FASTDIFF_HD void step_all(const StepRow<T> row, const T* x, const T* output, T* x_s, T* x0,
                          int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T predicted = step_x0(row, x[i], output[i]);
    x_s[i] = step_mean(row, x[i], output[i], predicted);
    x0[i] = predicted;
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

// Not templates: GCC clones only functions. All work on tiles in the L1 cache, where another pass
// costs little; memory is read and written once.
FASTDIFF_CLONES void guide(float scale, const float* cond, const float* uncond, float* out,
                           int64_t n) {
  guide_all(scale, cond, uncond, out, n);
}
FASTDIFF_CLONES void step(const StepRow<float>& row, const float* x, const float* output,
                          float* x_s, float* x0, int64_t n) {
  step_all(row, x, output, x_s, x0, n);
}
FASTDIFF_CLONES void noised(const StepRow<float>& row, const float* noise, float* x_s, int64_t n) {
  add_noise(row, noise, x_s, n);
}
FASTDIFF_CLONES void noised_by(const StepRow<float>& row, const float* v, const float* noise,
                               float* x_s, int64_t n) {
  add_learned_noise(row, v, noise, x_s, n);
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
    const double* output = heads(args.model_output, buffers, args.learned ? &v : nullptr);
    if (args.uncond) {
      const double* uncond = heads(args.uncond, buffers + 2 * size, nullptr);
      guide_all(args.guidance_scale, output, uncond, buffers, n);
      output = buffers;
    }
    double* x_s = static_cast<double*>(args.x_s) + offset;
    double* x0 = args.pred_x0 ? static_cast<double*>(args.pred_x0) + offset : buffers + 3 * size;
    step_all(row, static_cast<const double*>(args.x_t) + offset, output, x_s, x0, n);
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

  for_each_tile(layout, generated ? 4096 : 16384, [&](int64_t sample, int64_t first, int64_t n) {
    const int64_t offset = sample * layout.numel + first;
    const StepRow<float> row = step_row<float>(args.columns(sample), args.options());
    // x_t and x_s, x0, output, uncond, v; two tiles for pixels with both heads; noise.
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
    const float* output = heads(args.model_output, buffers + 2 * size, args.learned ? &v : nullptr);
    if (args.uncond) {
      const float* uncond = heads(args.uncond, buffers + 3 * size, nullptr);
      guide(scale, output, uncond, buffers + 2 * size, n);
      output = buffers + 2 * size;
    }

    const float* x = load_tile(args.x_type, args.x_t, offset, n, buffers);
    float* x_s = in_place ? static_cast<float*>(args.x_s) + offset : buffers;
    float* x0 = in_place && args.pred_x0 ? static_cast<float*>(args.pred_x0) + offset
                                         : buffers + size;
    step(row, x, output, x_s, x0, n);
    if (args.mode != NoiseMode::kNone) {
      const float* noise = generated ? normal_tile(layout, args.source.key(sample),
                                                   args.source.stream, first, n,
                                                   buffers + 7 * size)
                                     : load_tile(args.x_type, args.noise, offset, n,
                                                 buffers + 7 * size);
      if (v) {
        noised_by(row, v, noise, x_s, n);
      } else {
        noised(row, noise, x_s, n);
      }
    }
    if (in_place) return;
    store_tile(args.x_type, args.x_s, offset, n, x_s, stream);
    if (args.pred_x0) store_tile(args.x_type, args.pred_x0, offset, n, x0, stream);
  });
}

}  // namespace fastdiff::cpu
