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

template <typename S, typename A, bool Gain, typename F>
FASTDIFF_HD void row_apply(const void* x_data, void* y_data, int64_t rows, int64_t length,
                           const F* k, const F* slope, const F* offset, const F* gain_data) {
  with_length(length, [&](auto n) FASTDIFF_LAMBDA {
    for (int64_t row = 0; row < rows; ++row) {
      In<S> x = static_cast<In<S>>(x_data) + row * n;
      Out<S> y = static_cast<Out<S>>(y_data) + row * n;
      const F* __restrict gain = gain_data + (Gain ? row * n : 0);
      const F center = k[row], a = slope[row], b = offset[row];
      int64_t i = 0;
      const auto value = [&](int lane, F v) FASTDIFF_LAMBDA {
        const F result = A::value(a * (v - center) + b);
        if constexpr (Gain) return result * gain[i + lane];
        return result;
      };
      for (; i + kLanes <= n; i += kLanes) S::map(y + i, value, x + i);
      const int rest = static_cast<int>(n - i);
#pragma omp simd
      for (int lane = 0; lane < rest; ++lane) {
        y[i + lane] = S::store(value(lane, S::load(x[i + lane])));
      }
    }
  });
}

template <typename S, typename A, bool Gain, typename F>
FASTDIFF_HD void pixel_apply(const void* x_data, void* y_data, int64_t pixels, int64_t channels,
                             const F* k, const F* slope, const F* offset, const F* gain_data) {
  for (int64_t p = 0; p < pixels; ++p) {
    In<S> x = static_cast<In<S>>(x_data) + p * channels;
    Out<S> y = static_cast<Out<S>>(y_data) + p * channels;
    const F* __restrict gain = gain_data + (Gain ? p * channels : 0);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const F value = A::value(slope[c] * (S::load(x[c]) - k[c]) + offset[c]);
      y[c] = S::store(Gain ? value * gain[c] : value);
    }
  }
}

template <typename S, typename A, bool Keep, bool Gain, typename F>
FASTDIFF_HD void row_grad_sums(const void* x_data, const void* grad_data, int64_t rows,
                               int64_t length, const F* k, const F* slope, const F* offset,
                               const F* gain_data, F* kept_data, F* s0, F* s1, F* s2) {
  with_length(length, [&](auto n) FASTDIFF_LAMBDA {
    for (int64_t row = 0; row < rows; ++row) {
      In<S> x = static_cast<In<S>>(x_data) + row * n;
      In<S> grad = static_cast<In<S>>(grad_data) + row * n;
      F* __restrict kept = kept_data + (Keep ? row * n : 0);
      const F* __restrict gain = gain_data + (Gain ? row * n : 0);
      const F center = k[row], a = slope[row], b = offset[row];
      F t0[kLanes]{}, t1[kLanes]{}, t2[kLanes]{};
      int64_t i = 0;
      const auto add = [&](int lane, F value, F grad_y) FASTDIFF_LAMBDA {
        const F d = value - center;
        F dz = grad_y * A::slope(a * d + b);
        if constexpr (Gain) dz *= gain[i + lane];
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

template <typename S, typename A, bool Keep, bool Gain, typename F>
FASTDIFF_HD void pixel_grad_sums(const void* x_data, const void* grad_data, int64_t pixels,
                                 int64_t channels, const F* k, const F* slope, const F* offset,
                                 const F* gain_data, F* kept_data, F* __restrict s0,
                                 F* __restrict s1, F* __restrict s2) {
  for (int64_t c = 0; c < channels; ++c) s0[c] = s1[c] = s2[c] = 0;
  for (int64_t p = 0; p < pixels; ++p) {
    In<S> x = static_cast<In<S>>(x_data) + p * channels;
    In<S> grad = static_cast<In<S>>(grad_data) + p * channels;
    F* __restrict kept = kept_data + (Keep ? p * channels : 0);
    const F* __restrict gain = gain_data + (Gain ? p * channels : 0);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const F d = S::load(x[c]) - k[c];
      F dz = S::load(grad[c]) * A::slope(slope[c] * d + offset[c]);
      if constexpr (Gain) dz *= gain[c];
      if constexpr (Keep) kept[c] = dz;
      s0[c] += dz;
      s1[c] += dz * d;
      s2[c] += d;
    }
  }
}

// Where dz comes from in the second pass, and what is added to the result.
enum class Second { kKept, kComputed, kGain, kKeptAdd, kComputedAdd };
constexpr bool is_kept(Second second) {
  return second == Second::kKept || second == Second::kKeptAdd;
}
constexpr bool adds(Second second) {
  return second == Second::kKeptAdd || second == Second::kComputedAdd;
}

template <typename S, typename A, Second kSecond, typename F>
FASTDIFF_HD void row_grad_x(const void* x_data, const void* grad_data, const F* kept_data,
                            void* out_data, int64_t rows, int64_t length, const F* k,
                            const F* slope, const F* offset, const F* gain_data, const F* a,
                            const F* b, const F* c, const void* added_data, F* total) {
  with_length(length, [&](auto n) FASTDIFF_LAMBDA {
    for (int64_t row = 0; row < rows; ++row) {
      In<S> x = static_cast<In<S>>(x_data) + row * n;
      In<S> grad = static_cast<In<S>>(grad_data) + row * n;
      const F* __restrict kept = kept_data + (is_kept(kSecond) ? row * n : 0);
      const F* __restrict gain = gain_data + (kSecond == Second::kGain ? row * n : 0);
      In<S> added = added_data ? static_cast<In<S>>(added_data) + row * n : x;
      Out<S> out = static_cast<Out<S>>(out_data) + row * n;
      const F center = k[row], s = slope[row], o = offset[row];
      const F of_dz = a[row], of_d = b[row], constant = c[row];
      int64_t i = 0;
      const auto value = [&](int lane, F v, F grad_y) FASTDIFF_LAMBDA {
        const F d = v - center;
        F dz;
        if constexpr (is_kept(kSecond)) {
          dz = kept[i + lane];
        } else {
          dz = grad_y * A::slope(s * d + o);
        }
        if constexpr (kSecond == Second::kGain) dz *= gain[i + lane];
        return of_dz * dz + (of_d * d + constant);
      };
      const int whole = static_cast<int>(n / kLanes * kLanes), rest = static_cast<int>(n - whole);
      if constexpr (adds(kSecond)) {
        F sums[kLanes]{};
        const auto sum = [&](int lane, F v, F grad_y, F more) FASTDIFF_LAMBDA {
          const F result = value(lane, v, grad_y) + (added_data ? more : F(0));
          sums[lane] += result;
          return result;
        };
        for (; i < whole; i += kLanes) S::map(out + i, sum, x + i, grad + i, added + i);
#pragma omp simd
        for (int lane = 0; lane < rest; ++lane) {
          out[i + lane] = S::store(
              sum(lane, S::load(x[i + lane]), S::load(grad[i + lane]), S::load(added[i + lane])));
        }
        total[row] = add_lanes<kLanes>(sums);
      } else {
        for (; i < whole; i += kLanes) S::map(out + i, value, x + i, grad + i);
#pragma omp simd
        for (int lane = 0; lane < rest; ++lane) {
          out[i + lane] = S::store(value(lane, S::load(x[i + lane]), S::load(grad[i + lane])));
        }
      }
    }
  });
}

template <typename S, typename A, Second kSecond, typename F>
FASTDIFF_HD void pixel_grad_x(const void* x_data, const void* grad_data, const F* kept_data,
                              void* out_data, int64_t pixels, int64_t channels, const F* k,
                              const F* slope, const F* offset, const F* gain_data, const F* a,
                              const F* b, const F* constant, const void* added_data,
                              F* __restrict total) {
  if constexpr (adds(kSecond)) std::fill(total, total + channels, F(0));
  for (int64_t p = 0; p < pixels; ++p) {
    In<S> x = static_cast<In<S>>(x_data) + p * channels;
    In<S> grad = static_cast<In<S>>(grad_data) + p * channels;
    const F* __restrict kept = kept_data + (is_kept(kSecond) ? p * channels : 0);
    const F* __restrict gain = gain_data + (kSecond == Second::kGain ? p * channels : 0);
    In<S> added = added_data ? static_cast<In<S>>(added_data) + p * channels : x;
    Out<S> out = static_cast<Out<S>>(out_data) + p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const F d = S::load(x[c]) - k[c];
      F dz;
      if constexpr (is_kept(kSecond)) {
        dz = kept[c];
      } else {
        dz = S::load(grad[c]) * A::slope(slope[c] * d + offset[c]);
      }
      if constexpr (kSecond == Second::kGain) dz *= gain[c];
      F result = a[c] * dz + (b[c] * d + constant[c]);
      if constexpr (adds(kSecond)) {
        const F more = S::load(added[c]);
        result += added_data ? more : F(0);
        total[c] += result;
      }
      out[c] = S::store(result);
    }
  }
}

template <typename S, typename F>
FASTDIFF_HD void row_add(const void* x_data, const void* residual_data, void* sum_data,
                         int64_t rows, int64_t n, const F* bias) {
  for (int64_t row = 0; row < rows; ++row) {
    In<S> x = static_cast<In<S>>(x_data) + row * n;
    In<S> residual = static_cast<In<S>>(residual_data) + row * n;
    Out<S> sum = static_cast<Out<S>>(sum_data) + row * n;
    const F b = bias[row];
    const auto value = [=](int, F v, F w) FASTDIFF_LAMBDA { return (v + w) + b; };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) S::map(sum + i, value, x + i, residual + i);
#pragma omp simd
    for (int64_t j = i; j < n; ++j) {
      sum[j] = S::store(value(0, S::load(x[j]), S::load(residual[j])));
    }
  }
}

template <typename S, typename F>
FASTDIFF_HD void pixel_add(const void* x_data, const void* residual_data, void* sum_data,
                           int64_t pixels, int64_t channels, const F* bias) {
  for (int64_t p = 0; p < pixels; ++p) {
    In<S> x = static_cast<In<S>>(x_data) + p * channels;
    In<S> residual = static_cast<In<S>>(residual_data) + p * channels;
    Out<S> sum = static_cast<Out<S>>(sum_data) + p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] = S::store((S::load(x[c]) + S::load(residual[c])) + bias[c]);
    }
  }
}

// GroupNormKernels of the loops above for values in S and activation A, cloned for float.
template <typename S, typename A, typename F = typename S::F>
struct Table {
  static void row_apply_(const void* x, void* y, int64_t rows, int64_t n, const F* k,
                         const F* slope, const F* offset, const F* gain, bool) {
    const auto loop = gain ? float_clones<F, row_apply<S, A, true, F>>
                           : float_clones<F, row_apply<S, A, false, F>>;
    loop(x, y, rows, n, k, slope, offset, gain);
  }
  static void pixel_apply_(const void* x, void* y, int64_t pixels, int64_t channels, const F* k,
                           const F* slope, const F* offset, const F* gain, bool) {
    const auto loop = gain ? float_clones<F, pixel_apply<S, A, true, F>>
                           : float_clones<F, pixel_apply<S, A, false, F>>;
    loop(x, y, pixels, channels, k, slope, offset, gain);
  }
  static void row_grad_sums_(const void* x, const void* grad, int64_t rows, int64_t n, const F* k,
                             const F* slope, const F* offset, const F* gain, F* kept, F* s0, F* s1,
                             F* s2) {
    const auto loop = kept ? (gain ? float_clones<F, row_grad_sums<S, A, true, true, F>>
                                   : float_clones<F, row_grad_sums<S, A, true, false, F>>)
                           : (gain ? float_clones<F, row_grad_sums<S, A, false, true, F>>
                                   : float_clones<F, row_grad_sums<S, A, false, false, F>>);
    loop(x, grad, rows, n, k, slope, offset, gain, kept, s0, s1, s2);
  }
  static void pixel_grad_sums_(const void* x, const void* grad, int64_t pixels, int64_t channels,
                               const F* k, const F* slope, const F* offset, const F* gain, F* kept,
                               F* s0, F* s1, F* s2) {
    const auto loop = kept ? (gain ? float_clones<F, pixel_grad_sums<S, A, true, true, F>>
                                   : float_clones<F, pixel_grad_sums<S, A, true, false, F>>)
                           : (gain ? float_clones<F, pixel_grad_sums<S, A, false, true, F>>
                                   : float_clones<F, pixel_grad_sums<S, A, false, false, F>>);
    loop(x, grad, pixels, channels, k, slope, offset, gain, kept, s0, s1, s2);
  }
  static void row_grad_x_(const void* x, const void* grad, const F* kept, void* grad_x,
                          int64_t rows, int64_t n, const F* k, const F* slope, const F* offset,
                          const F* gain, const F* a, const F* b, const F* c, const void* grad_sum,
                          F* total, bool) {
    const auto loop = total  ? (kept ? float_clones<F, row_grad_x<S, A, Second::kKeptAdd, F>>
                                     : float_clones<F, row_grad_x<S, A, Second::kComputedAdd, F>>)
                      : kept ? float_clones<F, row_grad_x<S, A, Second::kKept, F>>
                      : gain ? float_clones<F, row_grad_x<S, A, Second::kGain, F>>
                             : float_clones<F, row_grad_x<S, A, Second::kComputed, F>>;
    loop(x, grad, kept, grad_x, rows, n, k, slope, offset, gain, a, b, c, grad_sum, total);
  }
  static void pixel_grad_x_(const void* x, const void* grad, const F* kept, void* grad_x,
                            int64_t pixels, int64_t channels, const F* k, const F* slope,
                            const F* offset, const F* gain, const F* a, const F* b, const F* c,
                            const void* grad_sum, F* total, bool) {
    const auto loop = total  ? (kept ? float_clones<F, pixel_grad_x<S, A, Second::kKeptAdd, F>>
                                     : float_clones<F, pixel_grad_x<S, A, Second::kComputedAdd, F>>)
                      : kept ? float_clones<F, pixel_grad_x<S, A, Second::kKept, F>>
                      : gain ? float_clones<F, pixel_grad_x<S, A, Second::kGain, F>>
                             : float_clones<F, pixel_grad_x<S, A, Second::kComputed, F>>;
    loop(x, grad, kept, grad_x, pixels, channels, k, slope, offset, gain, a, b, c, grad_sum, total);
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
            float_clones<F, row_add<S, F>>,
            float_clones<F, pixel_add<S, F>>,
            false,
            std::is_same_v<S, BFloat16>};
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
