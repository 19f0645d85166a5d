#include "fastdiff/eps_loss.h"

#include "bfloat16.h"
#include "elementwise.h"
#include "kernels.h"
#include "simd.h"

namespace fastdiff::cpu {
namespace {

template <LossKind Kind, typename T>
FASTDIFF_HD T sum_of(const T* prediction, const T* noise, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += loss_term<Kind>(prediction[i] - noise[i]);
  return sum;
}

template <LossKind Kind, typename T>
FASTDIFF_HD void slopes(T factor, const T* prediction, const T* noise, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = factor * loss_slope<Kind>(prediction[i] - noise[i]);
}

// The training default, mse of two bfloat16 arrays, two values in a word so that nothing is widened
// or packed; the general path converts tile by tile.
bool two_bfloat16(const EpsLossArgs& args) {
  return args.kind == LossKind::kMse && args.mode == NoiseMode::kGiven &&
         args.prediction_type == DType::kBFloat16 && args.noise_type == DType::kBFloat16;
}

FASTDIFF_HD float sum_mse_bfloat16_loop(const uint16_t* p, const uint16_t* e, int64_t n) {
  const Pair* p_pairs = reinterpret_cast<const Pair*>(p);
  const Pair* e_pairs = reinterpret_cast<const Pair*>(e);
  float low_sum = 0.0f, high_sum = 0.0f;
#pragma omp simd reduction(+ : low_sum, high_sum)
  for (int64_t i = 0; i < n / 2; ++i) {
    low_sum += loss_term<LossKind::kMse>(low(p_pairs[i]) - low(e_pairs[i]));
    high_sum += loss_term<LossKind::kMse>(high(p_pairs[i]) - high(e_pairs[i]));
  }
  if (n % 2) low_sum += loss_term<LossKind::kMse>(low(p[n - 1]) - low(e[n - 1]));
  return low_sum + high_sum;
}
constexpr auto sum_mse_bfloat16 = clones<sum_mse_bfloat16_loop>;

FASTDIFF_HD void slopes_mse_bfloat16_loop(float c, const uint16_t* p, const uint16_t* e,
                                          uint16_t* out, int64_t n) {
  const Pair* __restrict p_pairs = reinterpret_cast<const Pair*>(p);
  const Pair* __restrict e_pairs = reinterpret_cast<const Pair*>(e);
  Pair* __restrict out_pairs = reinterpret_cast<Pair*>(out);
#pragma omp simd
  for (int64_t i = 0; i < n / 2; ++i) {
    const uint32_t a = p_pairs[i], b = e_pairs[i];
    out_pairs[i] = bfloat16_pair(c * loss_slope<LossKind::kMse>(low(a) - low(b)),
                                 c * loss_slope<LossKind::kMse>(high(a) - high(b)));
  }
  if (n % 2) {
    const float y = c * loss_slope<LossKind::kMse>(low(p[n - 1]) - low(e[n - 1]));
    out[n - 1] = static_cast<uint16_t>(round_to_bfloat16(y) >> 16);
  }
}
constexpr auto slopes_mse_bfloat16 = clones<slopes_mse_bfloat16_loop>;

template <typename T>
T tile_sum(LossKind kind, const T* p, const T* e, int64_t n) {
  const auto function = kind == LossKind::kMse  ? float_clones<T, sum_of<LossKind::kMse, T>>
                        : kind == LossKind::kL1 ? float_clones<T, sum_of<LossKind::kL1, T>>
                                                : float_clones<T, sum_of<LossKind::kHuber, T>>;
  return function(p, e, n);
}

template <typename T>
void tile_slopes(LossKind kind, T c, const T* p, const T* e, T* out, int64_t n) {
  const auto function = kind == LossKind::kMse  ? float_clones<T, slopes<LossKind::kMse, T>>
                        : kind == LossKind::kL1 ? float_clones<T, slopes<LossKind::kL1, T>>
                                                : float_clones<T, slopes<LossKind::kHuber, T>>;
  function(c, p, e, out, n);
}

// Adds the tiles' sums in a fixed order, whatever the threads, in double, which is free here.
template <typename T>
void finish(const EpsLossArgs& args, const std::vector<T>& partials) {
  const int64_t batch = args.layout.batch;
  const int64_t per_sample = batch ? static_cast<int64_t>(partials.size()) / batch : 0;
  const T* weight = static_cast<const T*>(args.weight);
  T* out = static_cast<T*>(args.out);
  double total = 0;
  for (int64_t k = 0; k < batch; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < per_sample; ++i) sum += partials[k * per_sample + i];
    if (weight) sum *= weight[k];
    if (args.reduction == Reduction::kNone) out[k] = static_cast<T>(args.scale() * sum);
    total += sum;
  }
  if (args.reduction != Reduction::kNone) out[0] = static_cast<T>(args.scale() * total);
}

int64_t tiles_per_sample(const SampleLayout& layout) {
  return layout.numel ? (layout.numel + tile_elements(layout) - 1) / tile_elements(layout) : 0;
}

template <typename T>
T factor_of(const EpsLossArgs& args, int64_t sample) {
  const T* grad = static_cast<const T*>(args.grad);
  const T* weight = static_cast<const T*>(args.weight);
  T factor = static_cast<T>(args.scale());
  if (grad) factor *= grad[args.reduction == Reduction::kNone ? sample : 0];
  return weight ? factor * weight[sample] : factor;
}

// Writes the gradients of one tile that are asked for. `result` has the elements of a tile.
void write_gradients(const EpsLossArgs& args, int64_t sample, int64_t first, int64_t n,
                     const float* prediction, const float* noise, float* result, bool stream) {
  const float factor = factor_of<float>(args, sample);
  const int64_t offset = sample * args.layout.numel + first;
  const auto write = [&](void* grad, DType type, float c) {
    if (!grad) return;
    const bool in_place = type == DType::kFloat32 && !stream;
    float* out = in_place ? static_cast<float*>(grad) + offset : result;
    tile_slopes(args.kind, c, prediction, noise, out, n);
    if (!in_place) store_tile(type, grad, offset, n, out, stream);
  };
  write(args.grad_prediction, args.prediction_type, factor);
  write(args.grad_noise, args.noise_type, -factor);
}

void write_gradients(const EpsLossArgs& args, int64_t sample, int64_t first, int64_t n,
                     const uint16_t* prediction, const uint16_t* noise, float* result,
                     bool stream) {
  const float factor = factor_of<float>(args, sample);
  const auto write = [&](void* grad, float c) {
    if (!grad) return;
    uint16_t* final = static_cast<uint16_t*>(grad) + sample * args.layout.numel + first;
    uint16_t* out = stream ? reinterpret_cast<uint16_t*>(result) : final;
    slopes_mse_bfloat16(c, prediction, noise, out, n);
    if (stream) stream_bytes(final, out, 2 * n);
  };
  write(args.grad_prediction, factor);
  write(args.grad_noise, -factor);
}

bool streams(const EpsLossArgs& args) {
  const SampleLayout& layout = args.layout;
  return layout.batch * layout.numel * size_of(args.prediction_type) > kStreamBytes;
}

void eps_loss_double(const EpsLossArgs& args) {
  const SampleLayout& layout = args.layout;
  const int64_t size = tile_elements(layout), per_sample = tiles_per_sample(layout);
  std::vector<double> partials(layout.batch * per_sample);
  for_each_tile(layout, 8192, [&](int64_t sample, int64_t first, int64_t n) {
    const int64_t offset = sample * layout.numel + first;
    partials[sample * per_sample + first / size] =
        tile_sum(args.kind, static_cast<const double*>(args.prediction) + offset,
                 static_cast<const double*>(args.noise) + offset, n);
  });
  finish(args, partials);
}

void eps_loss_backward_double(const EpsLossArgs& args) {
  const SampleLayout& layout = args.layout;
  for_each_tile(layout, 8192, [&](int64_t sample, int64_t first, int64_t n) {
    const int64_t offset = sample * layout.numel + first;
    const double factor = factor_of<double>(args, sample);
    const double* prediction = static_cast<const double*>(args.prediction) + offset;
    const double* noise = static_cast<const double*>(args.noise) + offset;
    const auto write = [&](void* grad, double c) {
      if (grad) {
        tile_slopes(args.kind, c, prediction, noise, static_cast<double*>(grad) + offset, n);
      }
    };
    write(args.grad_prediction, factor);
    write(args.grad_noise, -factor);
  });
}

}  // namespace

void eps_loss(const EpsLossArgs& args) {
  if (args.prediction_type == DType::kFloat64) return eps_loss_double(args);
  const SampleLayout& layout = args.layout;
  const int64_t size = tile_elements(layout), per_sample = tiles_per_sample(layout);
  std::vector<float> partials(layout.batch * per_sample);
  const bool generated = args.mode == NoiseMode::kGenerated, stream = streams(args);
  const bool gradient = args.grad_prediction != nullptr;
  for_each_tile(layout, generated ? 4096 : 16384, [&](int64_t sample, int64_t first, int64_t n) {
    const int64_t offset = sample * layout.numel + first;
    float* buffer = thread_scratch(2 * size + normal_scratch(layout));
    float& partial = partials[sample * per_sample + first / size];
    if (two_bfloat16(args)) {
      const uint16_t* prediction = static_cast<const uint16_t*>(args.prediction) + offset;
      const uint16_t* noise = static_cast<const uint16_t*>(args.noise) + offset;
      partial = sum_mse_bfloat16(prediction, noise, n);
      if (gradient) write_gradients(args, sample, first, n, prediction, noise, buffer, stream);
      return;
    }
    const float* prediction = load_tile(args.prediction_type, args.prediction, offset, n, buffer);
    const float* noise = noise_tile(args, sample, first, n, buffer + 2 * size);
    partial = tile_sum(args.kind, prediction, noise, n);
    if (gradient) write_gradients(args, sample, first, n, prediction, noise, buffer + size, stream);
  });
  finish(args, partials);
}

void eps_loss_backward(const EpsLossArgs& args) {
  if (args.prediction_type == DType::kFloat64) return eps_loss_backward_double(args);
  const SampleLayout& layout = args.layout;
  const int64_t size = tile_elements(layout);
  const bool generated = args.mode == NoiseMode::kGenerated, stream = streams(args);
  for_each_tile(layout, generated ? 4096 : 16384, [&](int64_t sample, int64_t first, int64_t n) {
    const int64_t offset = sample * layout.numel + first;
    float* buffer = thread_scratch(2 * size + normal_scratch(layout));
    if (two_bfloat16(args)) {
      write_gradients(args, sample, first, n,
                      static_cast<const uint16_t*>(args.prediction) + offset,
                      static_cast<const uint16_t*>(args.noise) + offset, buffer, stream);
      return;
    }
    const float* prediction = load_tile(args.prediction_type, args.prediction, offset, n, buffer);
    const float* noise = noise_tile(args, sample, first, n, buffer + 2 * size);
    write_gradients(args, sample, first, n, prediction, noise, buffer + size, stream);
  });
}

}  // namespace fastdiff::cpu
