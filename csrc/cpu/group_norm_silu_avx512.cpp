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

  template <bool kStream>
  static FASTDIFF_INLINE void row_apply_(const void* x_data, void* y_data, int64_t rows, int64_t n,
                                         const float* k, const float* slope, const float* offset) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto* x = in<S>(x_data) + row * n;
      const V center = all(k[row]), a = all(slope[row]), b = all(offset[row]);
      write_run<S, kStream>(out<S>(y_data) + row * n, n, [&](int64_t i, Mask m) FASTDIFF_LAMBDA {
        return A::value(_mm512_fmadd_ps(a, _mm512_sub_ps(S::load(x + i, m), center), b));
      });
    }
  }

  static void row_apply(const void* x, void* y, int64_t rows, int64_t n, const float* k,
                        const float* slope, const float* offset, bool stream) {
    if (stream) return row_apply_<true>(x, y, rows, n, k, slope, offset);
    row_apply_<false>(x, y, rows, n, k, slope, offset);
  }

  template <bool kStream>
  static FASTDIFF_INLINE void pixel_apply_(const void* x_data, void* y_data, int64_t pixels,
                                           int64_t channels, const float* k, const float* slope,
                                           const float* offset) {
    for_pixel_blocks<4>(pixels, channels,
                        [&]<int kCount>(int64_t p, int64_t c, Mask m) FASTDIFF_LAMBDA {
                          const V center = Float32::load(k + c, m);
                          const V a = Float32::load(slope + c, m), b = Float32::load(offset + c, m);
                          for (int j = 0; j < kCount; ++j) {
                            const int64_t i = (p + j) * channels + c;
                            prefetch<kCount>(in<S>(x_data) + i, channels);
                            const V d = _mm512_sub_ps(S::load(in<S>(x_data) + i, m), center);
                            const V z = _mm512_fmadd_ps(a, d, b);
                            write_vector<S, kStream>(out<S>(y_data) + i, A::value(z), m);
                          }
                        });
  }

  static void pixel_apply(const void* x, void* y, int64_t pixels, int64_t channels, const float* k,
                          const float* slope, const float* offset, bool stream) {
    if (stream && are_vectors_aligned(out<S>(y), channels)) {
      return pixel_apply_<true>(x, y, pixels, channels, k, slope, offset);
    }
    pixel_apply_<false>(x, y, pixels, channels, k, slope, offset);
  }

  static FASTDIFF_INLINE V dz_of(V grad, V d, V slope, V offset) {
    return _mm512_mul_ps(grad, A::slope(_mm512_fmadd_ps(slope, d, offset)));
  }

  template <bool kKeep>
  static FASTDIFF_INLINE void row_grad_sums_(const void* x_data, const void* grad_data,
                                             int64_t rows, int64_t n, const float* k,
                                             const float* slope, const float* offset, float* kept,
                                             float* s0, float* s1, float* s2) {
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
            const V dz = dz_of(S::load(grad + i, m), d, a, b);
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
                            const float* k, const float* slope, const float* offset, float* kept,
                            float* s0, float* s1, float* s2) {
    if (kept) return row_grad_sums_<true>(x, grad, rows, n, k, slope, offset, kept, s0, s1, s2);
    row_grad_sums_<false>(x, grad, rows, n, k, slope, offset, kept, s0, s1, s2);
  }

  template <bool kKeep>
  static FASTDIFF_INLINE void pixel_grad_sums_(const void* x_data, const void* grad_data,
                                               int64_t pixels, int64_t channels, const float* k,
                                               const float* slope, const float* offset, float* kept,
                                               float* s0, float* s1, float* s2) {
    for (int64_t c = 0; c < channels; ++c) s0[c] = s1[c] = s2[c] = 0;
    for_pixel_blocks<4>(pixels, channels,
                        [&]<int kCount>(int64_t p, int64_t c, Mask m) FASTDIFF_LAMBDA {
                          const V center = Float32::load(k + c, m);
                          const V a = Float32::load(slope + c, m), b = Float32::load(offset + c, m);
                          V sum0 = Float32::load(s0 + c, m), sum1 = Float32::load(s1 + c, m);
                          V sum2 = Float32::load(s2 + c, m);
                          for (int j = 0; j < kCount; ++j) {
                            const int64_t i = (p + j) * channels + c;
                            prefetch<kCount>(in<S>(x_data) + i, channels);
                            prefetch<kCount>(in<S>(grad_data) + i, channels);
                            const V d = _mm512_sub_ps(S::load(in<S>(x_data) + i, m), center);
                            const V dz = dz_of(S::load(in<S>(grad_data) + i, m), d, a, b);
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
                              const float* k, const float* slope, const float* offset, float* kept,
                              float* s0, float* s1, float* s2) {
    if (kept) {
      return pixel_grad_sums_<true>(x, grad, pixels, channels, k, slope, offset, kept, s0, s1, s2);
    }
    pixel_grad_sums_<false>(x, grad, pixels, channels, k, slope, offset, kept, s0, s1, s2);
  }

  // grad_x of the vector at element i; the other arguments are the coefficients of its row or
  // channels.
  template <bool kKept>
  static FASTDIFF_INLINE V grad_x_of(const void* x, const void* grad, const float* kept, int64_t i,
                                     Mask m, V k, V slope, V offset, V a, V b, V c) {
    const V d = _mm512_sub_ps(S::load(in<S>(x) + i, m), k);
    V dz;
    if constexpr (kKept) {
      dz = Float32::load(kept + i, m);
    } else {
      dz = dz_of(S::load(in<S>(grad) + i, m), d, slope, offset);
    }
    return _mm512_fmadd_ps(a, dz, _mm512_fmadd_ps(b, d, c));
  }

  template <bool kKept, bool kStream>
  static void row_grad_x_(const void* x, const void* grad, const float* kept, void* grad_x,
                          int64_t rows, int64_t n, const float* k, const float* slope,
                          const float* offset, const float* a, const float* b, const float* c) {
    for (int64_t row = 0; row < rows; ++row) {
      const V center = all(k[row]), s = all(slope[row]), o = all(offset[row]);
      const V of_dz = all(a[row]), of_d = all(b[row]), constant = all(c[row]);
      write_run<S, kStream>(out<S>(grad_x) + row * n, n, [&](int64_t i, Mask m) FASTDIFF_LAMBDA {
        return grad_x_of<kKept>(x, grad, kept, row * n + i, m, center, s, o, of_dz, of_d, constant);
      });
    }
  }

  static void row_grad_x(const void* x, const void* grad, const float* kept, void* grad_x,
                         int64_t rows, int64_t n, const float* k, const float* slope,
                         const float* offset, const float* a, const float* b, const float* c,
                         bool stream) {
    const auto run = kept ? (stream ? row_grad_x_<true, true> : row_grad_x_<true, false>)
                          : (stream ? row_grad_x_<false, true> : row_grad_x_<false, false>);
    run(x, grad, kept, grad_x, rows, n, k, slope, offset, a, b, c);
  }

  template <bool kKept, bool kStream>
  static void pixel_grad_x_(const void* x, const void* grad, const float* kept, void* grad_x,
                            int64_t pixels, int64_t channels, const float* k, const float* slope,
                            const float* offset, const float* a, const float* b,
                            const float* constant) {
    for_pixel_blocks<4>(
        pixels, channels, [&]<int kCount>(int64_t p, int64_t c, Mask m) FASTDIFF_LAMBDA {
          const V center = Float32::load(k + c, m), s = Float32::load(slope + c, m);
          const V o = Float32::load(offset + c, m), of_dz = Float32::load(a + c, m);
          const V of_d = Float32::load(b + c, m), of_1 = Float32::load(constant + c, m);
          for (int j = 0; j < kCount; ++j) {
            const int64_t i = (p + j) * channels + c;
            prefetch<kCount>(in<S>(x) + i, channels);
            if constexpr (!kKept) prefetch<kCount>(in<S>(grad) + i, channels);
            write_vector<S, kStream>(
                out<S>(grad_x) + i,
                grad_x_of<kKept>(x, grad, kept, i, m, center, s, o, of_dz, of_d, of_1), m);
          }
        });
  }

  static void pixel_grad_x(const void* x, const void* grad, const float* kept, void* grad_x,
                           int64_t pixels, int64_t channels, const float* k, const float* slope,
                           const float* offset, const float* a, const float* b, const float* c,
                           bool stream) {
    stream = stream && are_vectors_aligned(out<S>(grad_x), channels);
    const auto run = kept ? (stream ? pixel_grad_x_<true, true> : pixel_grad_x_<true, false>)
                          : (stream ? pixel_grad_x_<false, true> : pixel_grad_x_<false, false>);
    run(x, grad, kept, grad_x, pixels, channels, k, slope, offset, a, b, c);
  }

  static GroupNormKernels<float> table() {
    return {row_sums,        pixel_sums, row_apply,    pixel_apply, row_grad_sums,
            pixel_grad_sums, row_grad_x, pixel_grad_x, true};
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
