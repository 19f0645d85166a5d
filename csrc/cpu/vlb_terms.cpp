// For this file only: both passes make branches of the selections in normal_tail.h, around which
// GCC does not vectorize. Scalar, these loops took six times the instructions (AVX2).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-pre", "no-thread-jumps")
#endif

#include "fastdiff/vlb_terms.h"

#include <algorithm>

#include "elementwise.h"
#include "heads.h"
#include "kernels.h"
#include "simd.h"

namespace fastdiff::cpu {
namespace {

// A tile of every input; v is null for a fixed variance.
struct Tile {
  const float *x0, *x, *output, *v, *noise;
  int64_t n;
};

struct Sums {
  float nats, x0, eps;
};

// In blocks: the terms of a block first, then their sums, because GCC does not vectorize both in
// one loop.
template <bool First, bool Learned>
FASTDIFF_HD Sums sums_of(const VlbRow& shared_row, const Tile& tile) {
  constexpr int64_t kBlock = 256;
  const VlbRow row = shared_row;
  const VlbVariance fixed = vlb_variance(row, 0.0f);
  float nats[kBlock], x0_error[kBlock], eps_error[kBlock];
  Sums sums{};
  for (int64_t begin = 0; begin < tile.n; begin += kBlock) {
    const float *x0 = tile.x0 + begin, *x = tile.x + begin, *output = tile.output + begin;
    const float *v = tile.v + (Learned ? begin : 0), *noise = tile.noise + begin;
    const int64_t count = std::min(kBlock, tile.n - begin);
#pragma GCC ivdep  // `omp simd` would turn structures declared in the loop into arrays, a lane each
    for (int64_t i = 0; i < count; ++i) {
      const VlbVariance variance = Learned ? vlb_variance(row, v[i]) : fixed;
      const VlbElement e = vlb_element(row, variance, x0[i], x[i], output[i], noise[i]);
      nats[i] = vlb_nats<First>(variance, e, x0[i]);
      x0_error[i] = e.x0_error;
      eps_error[i] = e.eps_error;
    }
    float sum = 0.0f, x0_square = 0.0f, eps_square = 0.0f;
#pragma omp simd reduction(+ : sum, x0_square, eps_square)
    for (int64_t i = 0; i < count; ++i) {
      sum += nats[i];
      x0_square += x0_error[i] * x0_error[i];
      eps_square += eps_error[i] * eps_error[i];
    }
    sums.nats += sum;
    sums.x0 += x0_square;
    sums.eps += eps_square;
  }
  return sums;
}

template <bool First, bool Learned>
FASTDIFF_HD void gradients_of(const VlbRow& shared_row, const VlbGradients& shared_grad,
                              const Tile& tile, float* grad_output, float* grad_v) {
  const VlbRow row = shared_row;
  const VlbGradients grad = shared_grad;
  const VlbVariance fixed = vlb_variance(row, 0.0f);
  const float *x0 = tile.x0, *x = tile.x, *output = tile.output, *v = tile.v, *noise = tile.noise;
  const int64_t n = tile.n;
#pragma GCC ivdep  // `omp simd` would turn structures declared in the loop into arrays, a lane each
  for (int64_t i = 0; i < n; ++i) {
    const VlbVariance variance = Learned ? vlb_variance(row, v[i]) : fixed;
    const VlbSlopes slopes =
        vlb_slopes<First>(row, variance, grad, x0[i], x[i], output[i], noise[i]);
    grad_output[i] = slopes.output;
    if constexpr (Learned) grad_v[i] = slopes.v;
  }
}

Sums tile_sums(const VlbRow& row, const Tile& tile) {
  const auto function =
      row.first ? (tile.v ? clones<sums_of<true, true>> : clones<sums_of<true, false>>)
                : (tile.v ? clones<sums_of<false, true>> : clones<sums_of<false, false>>);
  return function(row, tile);
}

void tile_gradients(const VlbRow& row, const VlbGradients& grad, const Tile& tile, float* output,
                    float* v) {
  const auto function =
      row.first ? (tile.v ? clones<gradients_of<true, true>> : clones<gradients_of<true, false>>)
                : (tile.v ? clones<gradients_of<false, true>> : clones<gradients_of<false, false>>);
  function(row, grad, tile, output, v);
}

// Floats that load needs: x0, x, output, v, two tiles for pixels with both heads, noise.
int64_t scratch_floats(const SampleLayout& layout) {
  return 6 * tile_elements(layout) + normal_scratch(layout);
}

Tile load(const VlbTermsArgs& args, int64_t sample, int64_t first, int64_t n, bool with_noise,
          float* scratch) {
  const int64_t size = tile_elements(args.layout), offset = sample * args.layout.numel + first;
  const int64_t base = args.output_base(sample);
  float *output = scratch + 2 * size, *v = scratch + 3 * size, *noise = scratch + 6 * size;
  Tile tile{};
  tile.n = n;
  tile.x0 = load_tile(args.noise_type, args.x0, offset, n, scratch);
  tile.x = load_tile(args.noise_type, args.x_t, offset, n, scratch + size);
  if (args.output_strided()) {
    const float* both =
        load_tile(args.output_type, args.model_output, base + 2 * first, 2 * n, scratch + 4 * size);
    split_heads(both, args.layout.inner, n, output, v);
    tile.output = output;
    tile.v = v;
  } else {
    tile.output = load_tile(args.output_type, args.model_output, base + first, n, output);
    if (args.learned) {
      tile.v = load_tile(args.output_type, args.model_output, base + args.variance_offset() + first,
                         n, v);
    }
  }
  if (with_noise) {
    tile.noise = noise_tile(args, sample, first, n, noise);
  } else {
    std::fill_n(noise, n, 0.0f);
    tile.noise = noise;
  }
  return tile;
}

int64_t elements_per_thread(const VlbTermsArgs& args) {
  return args.mode == NoiseMode::kGenerated ? 4096 : 8192;
}

}  // namespace

void vlb_terms(const VlbTermsArgs& args) {
  const SampleLayout& layout = args.layout;
  const int64_t size = tile_elements(layout);
  const int64_t per_sample = layout.numel ? (layout.numel + size - 1) / size : 0;
  std::vector<Sums> partials(layout.batch * per_sample);
  for_each_tile(layout, elements_per_thread(args), [&](int64_t sample, int64_t first, int64_t n) {
    const Tile tile = load(args, sample, first, n, true, thread_scratch(scratch_floats(layout)));
    partials[sample * per_sample + first / size] = tile_sums(args.row(sample), tile);
  });

  // The tiles' sums in a fixed order, whatever the threads, in double, which is free here.
  const double scale = 1.0 / static_cast<double>(layout.numel);
  for (int64_t k = 0; k < layout.batch; ++k) {
    double nats = 0, x0 = 0, eps = 0;
    for (int64_t i = k * per_sample; i < (k + 1) * per_sample; ++i) {
      nats += partials[i].nats;
      x0 += partials[i].x0;
      eps += partials[i].eps;
    }
    args.out[k] = static_cast<float>(scale * VlbTermsArgs::kBitsPerNat * nats);
    args.out[layout.batch + k] = static_cast<float>(scale * x0);
    args.out[2 * layout.batch + k] = static_cast<float>(scale * eps);
  }
}

void vlb_terms_backward(const VlbTermsArgs& args) {
  const SampleLayout& layout = args.layout;
  const int64_t size = tile_elements(layout), scratch = scratch_floats(layout);
  const int64_t elements = layout.batch * layout.numel * (args.learned ? 2 : 1);
  const bool stream = elements * size_of(args.output_type) > kStreamBytes;
  for_each_tile(layout, elements_per_thread(args), [&](int64_t sample, int64_t first, int64_t n) {
    const VlbGradients grad = args.gradients(sample);
    const int64_t base = args.output_base(sample);
    float* buffer = thread_scratch(scratch + 4 * size);
    float *output = buffer + scratch, *v = output + size, *both = v + size;
    // A gradient of zero needs no noise: L_vlb alone reads (or makes) one tensor less.
    const Tile tile = load(args, sample, first, n, grad.eps_mse != 0.0f, buffer);
    tile_gradients(args.row(sample), grad, tile, output, v);
    if (args.output_strided()) {
      join_heads(output, v, layout.inner, n, both);
      store_tile(args.output_type, args.grad_output, base + 2 * first, 2 * n, both, stream);
      return;
    }
    store_tile(args.output_type, args.grad_output, base + first, n, output, stream);
    if (args.learned) {
      store_tile(args.output_type, args.grad_output, base + args.variance_offset() + first, n, v,
                 stream);
    }
  });
}

}  // namespace fastdiff::cpu
