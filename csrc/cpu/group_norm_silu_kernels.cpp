#include <type_traits>

#include "fastdiff/sigmoid.h"
#include "group_norm_silu.h"
#include "lanes.h"
#include "simd.h"

namespace fastdiff::cpu {
namespace {

struct SiLU {
  template <typename F>
  static FASTDIFF_HD F value(F z) {
    return silu(z);
  }
  template <typename F>
  static FASTDIFF_HD F slope(F z) {
    return silu_slope(z);
  }
};

struct Identity {
  template <typename F>
  static FASTDIFF_HD F value(F z) {
    return z;
  }
  template <typename F>
  static FASTDIFF_HD F slope(F) {
    return F(1);
  }
};

template <typename S>
using In = const typename S::Type* __restrict;
template <typename S>
using Out = typename S::Type* __restrict;

// Calls body(n). Rows of kLanes, the 4x4 maps, get a loop of their own: what is constant is then
// loaded once rather than for every row.
template <typename Body>
FASTDIFF_HD void with_length(int64_t n, const Body& body) {
  n == kLanes ? body(std::integral_constant<int64_t, kLanes>()) : body(n);
}

template <typename S, typename F>
FASTDIFF_HD void row_sums(const void* x_data, int64_t rows, int64_t length, int64_t stride,
                          const F* k, F* sum, F* square) {
  with_length(length, [&](auto n) FASTDIFF_LAMBDA {
    for (int64_t row = 0; row < rows; ++row) {
      In<S> x = static_cast<In<S>>(x_data) + row * stride;
      const F center = k[row];
      F s[kLanes]{}, q[kLanes]{};
      const auto add = [&](int lane, F value) FASTDIFF_LAMBDA {
        const F d = value - center;
        s[lane] += d;
        q[lane] += d * d;
      };
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) S::each(add, x + i);
      for (int lane = 0; i < n; ++i, ++lane) add(lane, S::load(x[i]));
      sum[row] = add_lanes<kLanes>(s);
      square[row] = add_lanes<kLanes>(q);
    }
  });
}

// Four pixels at a time: the sums are loaded and stored once for them.
template <typename S, typename F>
FASTDIFF_HD void pixel_sums(const void* x_data, int64_t pixels, int64_t channels, const F* k,
                            F* __restrict sum, F* __restrict square) {
  In<S> x = static_cast<In<S>>(x_data);
  for (int64_t c = 0; c < channels; ++c) sum[c] = square[c] = 0;
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4, x += 4 * channels) {
    In<S> x1 = x + channels;
    In<S> x2 = x1 + channels;
    In<S> x3 = x2 + channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const F center = k[c];
      const F d0 = S::load(x[c]) - center, d1 = S::load(x1[c]) - center;
      const F d2 = S::load(x2[c]) - center, d3 = S::load(x3[c]) - center;
      sum[c] += (d0 + d1) + (d2 + d3);
      square[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; p < pixels; ++p, x += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const F d = S::load(x[c]) - k[c];
      sum[c] += d;
      square[c] += d * d;
    }
  }
}

template <typename S, typename A, typename F>
FASTDIFF_HD void row_apply(const void* x_data, void* y_data, int64_t rows, int64_t length,
                           const F* k, const F* slope, const F* offset) {
  with_length(length, [&](auto n) FASTDIFF_LAMBDA {
    for (int64_t row = 0; row < rows; ++row) {
      In<S> x = static_cast<In<S>>(x_data) + row * n;
      Out<S> y = static_cast<Out<S>>(y_data) + row * n;
      const F center = k[row], a = slope[row], b = offset[row];
      const auto value = [=](int, F v) FASTDIFF_LAMBDA { return A::value(a * (v - center) + b); };
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) S::map(y + i, value, x + i);
#pragma omp simd
      for (int64_t j = i; j < n; ++j) y[j] = S::store(value(0, S::load(x[j])));
    }
  });
}

template <typename S, typename A, typename F>
FASTDIFF_HD void pixel_apply(const void* x_data, void* y_data, int64_t pixels, int64_t channels,
                             const F* k, const F* slope, const F* offset) {
  for (int64_t p = 0; p < pixels; ++p) {
    In<S> x = static_cast<In<S>>(x_data) + p * channels;
    Out<S> y = static_cast<Out<S>>(y_data) + p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      y[c] = S::store(A::value(slope[c] * (S::load(x[c]) - k[c]) + offset[c]));
    }
  }
}

template <typename S, typename A, bool Keep, typename F>
FASTDIFF_HD void row_grad_sums(const void* x_data, const void* grad_data, int64_t rows,
                               int64_t length, const F* k, const F* slope, const F* offset,
                               F* kept_data, F* s0, F* s1, F* s2) {
  with_length(length, [&](auto n) FASTDIFF_LAMBDA {
    for (int64_t row = 0; row < rows; ++row) {
      In<S> x = static_cast<In<S>>(x_data) + row * n;
      In<S> grad = static_cast<In<S>>(grad_data) + row * n;
      F* __restrict kept = kept_data + row * n;
      const F center = k[row], a = slope[row], b = offset[row];
      F t0[kLanes]{}, t1[kLanes]{}, t2[kLanes]{};
      int64_t i = 0;
      const auto add = [&](int lane, F value, F grad_y) FASTDIFF_LAMBDA {
        const F d = value - center, dz = grad_y * A::slope(a * d + b);
        if constexpr (Keep) kept[i + lane] = dz;  // in the order of the lanes
        t0[lane] += dz;
        t1[lane] += dz * d;
        t2[lane] += d;
      };
      for (; i + kLanes <= n; i += kLanes) S::each(add, x + i, grad + i);
      const int rest = static_cast<int>(n - i);
#pragma omp simd
      for (int lane = 0; lane < rest; ++lane) {
        add(lane, S::load(x[i + lane]), S::load(grad[i + lane]));
      }
      s0[row] = add_lanes<kLanes>(t0);
      s1[row] = add_lanes<kLanes>(t1);
      if (s2) s2[row] = add_lanes<kLanes>(t2);
    }
  });
}

template <typename S, typename A, bool Keep, typename F>
FASTDIFF_HD void pixel_grad_sums(const void* x_data, const void* grad_data, int64_t pixels,
                                 int64_t channels, const F* k, const F* slope, const F* offset,
                                 F* kept_data, F* __restrict s0, F* __restrict s1,
                                 F* __restrict s2) {
  for (int64_t c = 0; c < channels; ++c) s0[c] = s1[c] = s2[c] = 0;
  for (int64_t p = 0; p < pixels; ++p) {
    In<S> x = static_cast<In<S>>(x_data) + p * channels;
    In<S> grad = static_cast<In<S>>(grad_data) + p * channels;
    F* __restrict kept = kept_data + p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const F d = S::load(x[c]) - k[c];
      const F dz = S::load(grad[c]) * A::slope(slope[c] * d + offset[c]);
      if constexpr (Keep) kept[c] = dz;
      s0[c] += dz;
      s1[c] += dz * d;
      s2[c] += d;
    }
  }
}

template <typename S, typename A, bool Kept, typename F>
FASTDIFF_HD void row_grad_x(const void* x_data, const void* grad_data, const F* kept_data,
                            void* out_data, int64_t rows, int64_t length, const F* k,
                            const F* slope, const F* offset, const F* a, const F* b, const F* c) {
  with_length(length, [&](auto n) FASTDIFF_LAMBDA {
    for (int64_t row = 0; row < rows; ++row) {
      In<S> x = static_cast<In<S>>(x_data) + row * n;
      In<S> grad = static_cast<In<S>>(grad_data) + row * n;
      const F* __restrict kept = kept_data + row * n;
      Out<S> out = static_cast<Out<S>>(out_data) + row * n;
      const F center = k[row], s = slope[row], o = offset[row];
      const F of_dz = a[row], of_d = b[row], constant = c[row];
      int64_t i = 0;
      const auto value = [&](int lane, F v, F grad_y) FASTDIFF_LAMBDA {
        const F d = v - center;
        const F dz = Kept ? kept[i + lane] : grad_y * A::slope(s * d + o);
        return of_dz * dz + (of_d * d + constant);
      };
      for (; i + kLanes <= n; i += kLanes) S::map(out + i, value, x + i, grad + i);
      const int rest = static_cast<int>(n - i);
#pragma omp simd
      for (int lane = 0; lane < rest; ++lane) {
        out[i + lane] = S::store(value(lane, S::load(x[i + lane]), S::load(grad[i + lane])));
      }
    }
  });
}

template <typename S, typename A, bool Kept, typename F>
FASTDIFF_HD void pixel_grad_x(const void* x_data, const void* grad_data, const F* kept_data,
                              void* out_data, int64_t pixels, int64_t channels, const F* k,
                              const F* slope, const F* offset, const F* a, const F* b,
                              const F* constant) {
  for (int64_t p = 0; p < pixels; ++p) {
    In<S> x = static_cast<In<S>>(x_data) + p * channels;
    In<S> grad = static_cast<In<S>>(grad_data) + p * channels;
    const F* __restrict kept = kept_data + p * channels;
    Out<S> out = static_cast<Out<S>>(out_data) + p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const F d = S::load(x[c]) - k[c];
      F dz;
      if constexpr (Kept) {
        dz = kept[c];
      } else {
        dz = S::load(grad[c]) * A::slope(slope[c] * d + offset[c]);
      }
      out[c] = S::store(a[c] * dz + (b[c] * d + constant[c]));
    }
  }
}

// GroupNormKernels of the loops above for values in S and activation A, cloned for float.
template <typename S, typename A, typename F = typename S::F>
struct Table {
  static void row_apply_(const void* x, void* y, int64_t rows, int64_t n, const F* k,
                         const F* slope, const F* offset, bool) {
    float_clones<F, row_apply<S, A, F>>(x, y, rows, n, k, slope, offset);
  }
  static void pixel_apply_(const void* x, void* y, int64_t pixels, int64_t channels, const F* k,
                           const F* slope, const F* offset, bool) {
    float_clones<F, pixel_apply<S, A, F>>(x, y, pixels, channels, k, slope, offset);
  }
  static void row_grad_sums_(const void* x, const void* grad, int64_t rows, int64_t n, const F* k,
                             const F* slope, const F* offset, F* kept, F* s0, F* s1, F* s2) {
    const auto loop = kept ? float_clones<F, row_grad_sums<S, A, true, F>>
                           : float_clones<F, row_grad_sums<S, A, false, F>>;
    loop(x, grad, rows, n, k, slope, offset, kept, s0, s1, s2);
  }
  static void pixel_grad_sums_(const void* x, const void* grad, int64_t pixels, int64_t channels,
                               const F* k, const F* slope, const F* offset, F* kept, F* s0, F* s1,
                               F* s2) {
    const auto loop = kept ? float_clones<F, pixel_grad_sums<S, A, true, F>>
                           : float_clones<F, pixel_grad_sums<S, A, false, F>>;
    loop(x, grad, pixels, channels, k, slope, offset, kept, s0, s1, s2);
  }
  static void row_grad_x_(const void* x, const void* grad, const F* kept, void* grad_x,
                          int64_t rows, int64_t n, const F* k, const F* slope, const F* offset,
                          const F* a, const F* b, const F* c, bool) {
    const auto loop = kept ? float_clones<F, row_grad_x<S, A, true, F>>
                           : float_clones<F, row_grad_x<S, A, false, F>>;
    loop(x, grad, kept, grad_x, rows, n, k, slope, offset, a, b, c);
  }
  static void pixel_grad_x_(const void* x, const void* grad, const F* kept, void* grad_x,
                            int64_t pixels, int64_t channels, const F* k, const F* slope,
                            const F* offset, const F* a, const F* b, const F* c, bool) {
    const auto loop = kept ? float_clones<F, pixel_grad_x<S, A, true, F>>
                           : float_clones<F, pixel_grad_x<S, A, false, F>>;
    loop(x, grad, kept, grad_x, pixels, channels, k, slope, offset, a, b, c);
  }

  static GroupNormKernels<F> table() {
    return {float_clones<F, row_sums<S, F>>,
            float_clones<F, pixel_sums<S, F>>,
            row_apply_,
            pixel_apply_,
            row_grad_sums_,
            pixel_grad_sums_,
            row_grad_x_,
            pixel_grad_x_,
            false};
  }
};

template <typename S>
GroupNormKernels<typename S::F> table_of(Activation activation) {
  return activation == Activation::kSilu ? Table<S, SiLU>::table() : Table<S, Identity>::table();
}

}  // namespace

template <>
GroupNormKernels<float> group_norm_kernels<float>(DType x_type, Activation activation) {
#if FASTDIFF_HAS_CLONES
  static const bool has_avx512 = isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  if (has_avx512) return group_norm_kernels_avx512(x_type, activation);
#endif
  switch (x_type) {
    case DType::kBFloat16:
      return table_of<BFloat16>(activation);
    case DType::kFloat16:
      return table_of<Float16>(activation);
    default:
      return table_of<Plain<float>>(activation);
  }
}

template <>
GroupNormKernels<double> group_norm_kernels<double>(DType, Activation activation) {
  return table_of<Plain<double>>(activation);
}

}  // namespace fastdiff::cpu
