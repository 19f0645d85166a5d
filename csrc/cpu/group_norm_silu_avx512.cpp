// The loops of group_norm_silu for CPUs with AVX-512 and its bfloat16 instructions (Zen 4, Sapphire
// Rapids): what GCC does not find in the portable loops of group_norm_silu_kernels.cpp.

#include "group_norm_silu.h"
#include "simd.h"

#if FASTDIFF_HAS_CLONES
#pragma GCC target("arch=x86-64-v4,avx512bf16")  // from here on; the caller asks the CPU first

// GCC bug 105593: its own intrinsics read variables that it then finds uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "group_norm_silu_avx512.h"

namespace fastdiff::cpu {
namespace {

template <typename S, typename A>
struct Kernels {
  static void row_sums(const void* x_data, int64_t rows, int64_t n, int64_t stride, const float* k,
                       float* sum, float* square) {
    V s[4]{}, q[4]{};
    for_four_rows(
        rows,
        [&](int64_t row, int64_t j) FASTDIFF_LAMBDA {
          const auto* x = in<S>(x_data) + row * stride;
          const V center = all(k[row]);
          // Four chains of additions: one would wait for each addition's latency.
          V sums[4]{}, squares[4]{};
          int64_t i = 0;
          for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
            for (int lane = 0; lane < 4; ++lane) {
              const V d = _mm512_sub_ps(S::load(x + i + lane * kLanes, kAll), center);
              sums[lane] = _mm512_add_ps(sums[lane], d);
              squares[lane] = _mm512_fmadd_ps(d, d, squares[lane]);
            }
          }
          for_vectors(n - i, [&](int64_t at, Mask m) FASTDIFF_LAMBDA {
            const V d = _mm512_maskz_sub_ps(m, S::load(x + i + at, m), center);
            sums[0] = _mm512_add_ps(sums[0], d);
            squares[0] = _mm512_fmadd_ps(d, d, squares[0]);
          });
          s[j] = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
          q[j] = _mm512_add_ps(_mm512_add_ps(squares[0], squares[1]),
                               _mm512_add_ps(squares[2], squares[3]));
        },
        [&](int64_t row, __mmask8 m) FASTDIFF_LAMBDA {
          _mm_mask_storeu_ps(sum + row, m, sums_of(s));
          _mm_mask_storeu_ps(square + row, m, sums_of(q));
        });
  }

  static void pixel_sums(const void* x_data, int64_t pixels, int64_t channels, const float* k,
                         float* sum, float* square) {
    for (int64_t c = 0; c < channels; ++c) sum[c] = square[c] = 0;
    for_pixel_blocks<8>(pixels, channels,
                        [&]<int kCount>(int64_t p, int64_t c, Mask m) FASTDIFF_LAMBDA {
                          const V center = Float32::load(k + c, m);
                          V s = Float32::load(sum + c, m), q = Float32::load(square + c, m);
                          for (int j = 0; j < kCount; ++j) {
                            const auto* x = in<S>(x_data) + (p + j) * channels + c;
                            prefetch<kCount>(x, channels);
                            const V d = _mm512_sub_ps(S::load(x, m), center);
                            s = _mm512_add_ps(s, d);
                            q = _mm512_fmadd_ps(d, d, q);
                          }
                          Float32::store(sum + c, s, m);
                          Float32::store(square + c, q, m);
                        });
  }

  template <bool kStream, bool kGain>
  static void row_apply_(const void* x_data, void* y_data, int64_t rows, int64_t n, const float* k,
                         const float* slope, const float* offset, const float* gain) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto* x = in<S>(x_data) + row * n;
      const V center = all(k[row]), a = all(slope[row]), b = all(offset[row]);
      write_run<S, kStream>(out<S>(y_data) + row * n, n, [&](int64_t i, Mask m) FASTDIFF_LAMBDA {
        const V value = A::value(_mm512_fmadd_ps(a, _mm512_sub_ps(S::load(x + i, m), center), b));
        return gained<kGain>(value, gain, row * n + i, m);
      });
    }
  }

  // Times what dropout multiplies the vector at element i with.
  template <bool kGain>
  static FASTDIFF_INLINE V gained(V value, const float* gain, int64_t i, Mask m) {
    if constexpr (kGain) return _mm512_mul_ps(value, Float32::load(gain + i, m));
    return value;
  }

  static void row_apply(const void* x, void* y, int64_t rows, int64_t n, const float* k,
                        const float* slope, const float* offset, const float* gain, bool stream) {
    const auto run = gain ? (stream ? row_apply_<true, true> : row_apply_<false, true>)
                          : (stream ? row_apply_<true, false> : row_apply_<false, false>);
    run(x, y, rows, n, k, slope, offset, gain);
  }

  template <bool kStream, bool kGain>
  static void pixel_apply_(const void* x_data, void* y_data, int64_t pixels, int64_t channels,
                           const float* k, const float* slope, const float* offset,
                           const float* gain) {
    for_pixel_blocks<4>(pixels, channels,
                        [&]<int kCount>(int64_t p, int64_t c, Mask m) FASTDIFF_LAMBDA {
                          const V center = Float32::load(k + c, m);
                          const V a = Float32::load(slope + c, m), b = Float32::load(offset + c, m);
                          for (int j = 0; j < kCount; ++j) {
                            const int64_t i = (p + j) * channels + c;
                            prefetch<kCount>(in<S>(x_data) + i, channels);
                            const V d = _mm512_sub_ps(S::load(in<S>(x_data) + i, m), center);
                            const V z = _mm512_fmadd_ps(a, d, b);
                            const V y = gained<kGain>(A::value(z), gain, i, m);
                            write_vector<S, kStream>(out<S>(y_data) + i, y, m);
                          }
                        });
  }

  static void pixel_apply(const void* x, void* y, int64_t pixels, int64_t channels, const float* k,
                          const float* slope, const float* offset, const float* gain, bool stream) {
    stream = stream && are_vectors_aligned(out<S>(y), channels);
    const auto run = gain ? (stream ? pixel_apply_<true, true> : pixel_apply_<false, true>)
                          : (stream ? pixel_apply_<true, false> : pixel_apply_<false, false>);
    run(x, y, pixels, channels, k, slope, offset, gain);
  }

  static FASTDIFF_INLINE V dz_of(V grad, V d, V slope, V offset) {
    return _mm512_mul_ps(grad, A::slope(_mm512_fmadd_ps(slope, d, offset)));
  }

  template <bool kKeep, bool kGain>
  static void row_grad_sums_(const void* x_data, const void* grad_data, int64_t rows, int64_t n,
                             const float* k, const float* slope, const float* offset,
                             const float* gain, float* kept, float* s0, float* s1, float* s2) {
    V t0[4]{}, t1[4]{}, t2[4]{};
    for_four_rows(
        rows,
        [&](int64_t row, int64_t j) FASTDIFF_LAMBDA {
          const auto* x = in<S>(x_data) + row * n;
          const auto* grad = in<S>(grad_data) + row * n;
          const V center = all(k[row]), a = all(slope[row]), b = all(offset[row]);
          V sum0 = _mm512_setzero_ps(), sum1 = sum0, sum2 = sum0;
          for_vectors(n, [&](int64_t i, Mask m) FASTDIFF_LAMBDA {
            const V d = _mm512_maskz_sub_ps(m, S::load(x + i, m), center);
            const V dz = gained<kGain>(dz_of(S::load(grad + i, m), d, a, b), gain, row * n + i, m);
            if constexpr (kKeep) Float32::store(kept + row * n + i, dz, m);
            sum0 = _mm512_add_ps(sum0, dz);
            sum1 = _mm512_fmadd_ps(dz, d, sum1);
            sum2 = _mm512_add_ps(sum2, d);
          });
          t0[j] = sum0;
          t1[j] = sum1;
          t2[j] = sum2;
        },
        [&](int64_t row, __mmask8 m) FASTDIFF_LAMBDA {
          _mm_mask_storeu_ps(s0 + row, m, sums_of(t0));
          _mm_mask_storeu_ps(s1 + row, m, sums_of(t1));
          if (s2) _mm_mask_storeu_ps(s2 + row, m, sums_of(t2));
        });
  }

  static void row_grad_sums(const void* x, const void* grad, int64_t rows, int64_t n,
                            const float* k, const float* slope, const float* offset,
                            const float* gain, float* kept, float* s0, float* s1, float* s2) {
    const auto run = gain ? (kept ? row_grad_sums_<true, true> : row_grad_sums_<false, true>)
                          : (kept ? row_grad_sums_<true, false> : row_grad_sums_<false, false>);
    run(x, grad, rows, n, k, slope, offset, gain, kept, s0, s1, s2);
  }

  template <bool kKeep, bool kGain>
  static void pixel_grad_sums_(const void* x_data, const void* grad_data, int64_t pixels,
                               int64_t channels, const float* k, const float* slope,
                               const float* offset, const float* gain, float* kept, float* s0,
                               float* s1, float* s2) {
    for (int64_t c = 0; c < channels; ++c) s0[c] = s1[c] = s2[c] = 0;
    for_pixel_blocks<4>(
        pixels, channels, [&]<int kCount>(int64_t p, int64_t c, Mask m) FASTDIFF_LAMBDA {
          const V center = Float32::load(k + c, m);
          const V a = Float32::load(slope + c, m), b = Float32::load(offset + c, m);
          V sum0 = Float32::load(s0 + c, m), sum1 = Float32::load(s1 + c, m);
          V sum2 = Float32::load(s2 + c, m);
          for (int j = 0; j < kCount; ++j) {
            const int64_t i = (p + j) * channels + c;
            prefetch<kCount>(in<S>(x_data) + i, channels);
            prefetch<kCount>(in<S>(grad_data) + i, channels);
            const V d = _mm512_sub_ps(S::load(in<S>(x_data) + i, m), center);
            const V dz =
                gained<kGain>(dz_of(S::load(in<S>(grad_data) + i, m), d, a, b), gain, i, m);
            if constexpr (kKeep) Float32::store(kept + i, dz, m);
            sum0 = _mm512_add_ps(sum0, dz);
            sum1 = _mm512_fmadd_ps(dz, d, sum1);
            sum2 = _mm512_add_ps(sum2, d);
          }
          Float32::store(s0 + c, sum0, m);
          Float32::store(s1 + c, sum1, m);
          Float32::store(s2 + c, sum2, m);
        });
  }

  static void pixel_grad_sums(const void* x, const void* grad, int64_t pixels, int64_t channels,
                              const float* k, const float* slope, const float* offset,
                              const float* gain, float* kept, float* s0, float* s1, float* s2) {
    const auto run = gain ? (kept ? pixel_grad_sums_<true, true> : pixel_grad_sums_<false, true>)
                          : (kept ? pixel_grad_sums_<true, false> : pixel_grad_sums_<false, false>);
    run(x, grad, pixels, channels, k, slope, offset, gain, kept, s0, s1, s2);
  }

  // Where dz comes from in the second pass, and whether grad_sum is added.
  enum class Second { kKept, kComputed, kGain, kKeptAdd, kComputedAdd };
  static constexpr bool is_kept(Second second) {
    return second == Second::kKept || second == Second::kKeptAdd;
  }
  static constexpr bool adds(Second second) {
    return second == Second::kKeptAdd || second == Second::kComputedAdd;
  }

  // The tensors of the second pass.
  struct GradX {
    const void *x, *grad;
    const float *kept, *gain;
    void* grad_x;
    const void* grad_sum;
  };

  // grad_x of the vector at element i; the other arguments are the coefficients of its row or
  // channels.
  template <Second kSecond>
  static FASTDIFF_INLINE V grad_x_of(const GradX& t, int64_t i, Mask m, V k, V slope, V offset, V a,
                                     V b, V c) {
    const V d = _mm512_sub_ps(S::load(in<S>(t.x) + i, m), k);
    V dz;
    if constexpr (is_kept(kSecond)) {
      dz = Float32::load(t.kept + i, m);
    } else {
      dz = dz_of(S::load(in<S>(t.grad) + i, m), d, slope, offset);
      dz = gained < kSecond == Second::kGain > (dz, t.gain, i, m);
    }
    const V result = _mm512_fmadd_ps(a, dz, _mm512_fmadd_ps(b, d, c));
    if constexpr (adds(kSecond)) {
      if (t.grad_sum) return _mm512_add_ps(result, S::load(in<S>(t.grad_sum) + i, m));
    }
    return result;
  }

  template <Second kSecond, bool kStream>
  static void row_grad_x_(const GradX& t, int64_t rows, int64_t n, const float* k,
                          const float* slope, const float* offset, const float* a, const float* b,
                          const float* c, float* total) {
    for (int64_t row = 0; row < rows; ++row) {
      const V center = all(k[row]), s = all(slope[row]), o = all(offset[row]);
      const V of_dz = all(a[row]), of_d = all(b[row]), constant = all(c[row]);
      V sum = _mm512_setzero_ps();
      write_run<S, kStream>(out<S>(t.grad_x) + row * n, n, [&](int64_t i, Mask m) FASTDIFF_LAMBDA {
        const V value = grad_x_of<kSecond>(t, row * n + i, m, center, s, o, of_dz, of_d, constant);
        if constexpr (adds(kSecond)) sum = _mm512_mask_add_ps(sum, m, sum, value);
        return value;
      });
      if constexpr (adds(kSecond)) total[row] = _mm512_reduce_add_ps(sum);
    }
  }

  static void row_grad_x(const void* x, const void* grad, const float* kept, void* grad_x,
                         int64_t rows, int64_t n, const float* k, const float* slope,
                         const float* offset, const float* gain, const float* a, const float* b,
                         const float* c, const void* grad_sum, float* total, bool stream) {
    const auto run = chosen(kept, gain, total, [&]<Second kSecond>() {
      return stream ? row_grad_x_<kSecond, true> : row_grad_x_<kSecond, false>;
    });
    run({x, grad, kept, gain, grad_x, grad_sum}, rows, n, k, slope, offset, a, b, c, total);
  }

  template <Second kSecond, bool kStream>
  static void pixel_grad_x_(const GradX& t, int64_t pixels, int64_t channels, const float* k,
                            const float* slope, const float* offset, const float* a, const float* b,
                            const float* constant, float* total) {
    if constexpr (adds(kSecond)) std::fill(total, total + channels, 0.0f);
    for_pixel_blocks<4>(
        pixels, channels, [&]<int kCount>(int64_t p, int64_t c, Mask m) FASTDIFF_LAMBDA {
          const V center = Float32::load(k + c, m), s = Float32::load(slope + c, m);
          const V o = Float32::load(offset + c, m), of_dz = Float32::load(a + c, m);
          const V of_d = Float32::load(b + c, m), of_1 = Float32::load(constant + c, m);
          V sum = _mm512_setzero_ps();
          for (int j = 0; j < kCount; ++j) {
            const int64_t i = (p + j) * channels + c;
            prefetch<kCount>(in<S>(t.x) + i, channels);
            if constexpr (!is_kept(kSecond)) prefetch<kCount>(in<S>(t.grad) + i, channels);
            if constexpr (adds(kSecond)) {
              if (t.grad_sum) prefetch<kCount>(in<S>(t.grad_sum) + i, channels);
            }
            const V value = grad_x_of<kSecond>(t, i, m, center, s, o, of_dz, of_d, of_1);
            if constexpr (adds(kSecond)) sum = _mm512_add_ps(sum, value);
            write_vector<S, kStream>(out<S>(t.grad_x) + i, value, m);
          }
          if constexpr (adds(kSecond)) {
            Float32::store(total + c, _mm512_add_ps(Float32::load(total + c, m), sum), m);
          }
        });
  }

  static void pixel_grad_x(const void* x, const void* grad, const float* kept, void* grad_x,
                           int64_t pixels, int64_t channels, const float* k, const float* slope,
                           const float* offset, const float* gain, const float* a, const float* b,
                           const float* c, const void* grad_sum, float* total, bool stream) {
    stream = stream && are_vectors_aligned(out<S>(grad_x), channels);
    const auto run = chosen(kept, gain, total, [&]<Second kSecond>() {
      return stream ? pixel_grad_x_<kSecond, true> : pixel_grad_x_<kSecond, false>;
    });
    run({x, grad, kept, gain, grad_x, grad_sum}, pixels, channels, k, slope, offset, a, b, c,
        total);
  }

  template <typename Choose>
  static auto chosen(const float* kept, const float* gain, const float* total,
                     const Choose& choose) {
    if (total) {
      return kept ? choose.template operator()<Second::kKeptAdd>()
                  : choose.template operator()<Second::kComputedAdd>();
    }
    if (kept) return choose.template operator()<Second::kKept>();
    return gain ? choose.template operator()<Second::kGain>()
                : choose.template operator()<Second::kComputed>();
  }

  static void row_add(const void* x_data, const void* residual_data, void* sum_data, int64_t rows,
                      int64_t n, const float* bias) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto* x = in<S>(x_data) + row * n;
      const auto* residual = in<S>(residual_data) + row * n;
      const V b = all(bias[row]);
      write_run<S, false>(out<S>(sum_data) + row * n, n, [&](int64_t i, Mask m) FASTDIFF_LAMBDA {
        return _mm512_add_ps(_mm512_add_ps(S::load(x + i, m), S::load(residual + i, m)), b);
      });
    }
  }

  static void pixel_add(const void* x, const void* residual, void* sum, int64_t pixels,
                        int64_t channels, const float* bias) {
    for (int64_t p = 0; p < pixels; ++p) {
      for_vectors(channels, [&](int64_t c, Mask m) FASTDIFF_LAMBDA {
        const int64_t i = p * channels + c;
        const V pair = _mm512_add_ps(S::load(in<S>(x) + i, m), S::load(in<S>(residual) + i, m));
        S::store(out<S>(sum) + i, _mm512_add_ps(pair, Float32::load(bias + c, m)), m);
      });
    }
  }

  static GroupNormKernels<float> table() {
    return {row_sums,   pixel_sums,   row_apply, pixel_apply, row_grad_sums, pixel_grad_sums,
            row_grad_x, pixel_grad_x, row_add,   pixel_add,   true,          false};
  }
};

template <typename S>
GroupNormKernels<float> table_of(Activation activation) {
  return activation == Activation::kSilu ? Kernels<S, SiLU>::table()
                                         : Kernels<S, Identity>::table();
}

}  // namespace

GroupNormKernels<float> group_norm_kernels_avx512(DType x_type, Activation activation) {
  switch (x_type) {
    case DType::kBFloat16:
      return table_of<BFloat16>(activation);
    case DType::kFloat16:
      return table_of<Float16>(activation);
    default:
      return table_of<Float32>(activation);
  }
}

}  // namespace fastdiff::cpu

#endif
