// The loops of group_norm_silu for CPUs with AVX-512 and its bfloat16 instructions (Zen 4, Sapphire
// Rapids): what GCC does not find in the portable loops of group_norm_silu_kernels.cpp.

#include "group_norm_silu.h"
#include "simd.h"

#if FASTDIFF_HAS_CLONES
#pragma GCC target("arch=x86-64-v4,avx512bf16")  // from here on; the caller asks the CPU first

// GCC bug 105593: its own intrinsics read variables that it then finds uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#define FASTDIFF_INLINE inline __attribute__((always_inline))
#define FASTDIFF_LAMBDA __attribute__((always_inline))

namespace fastdiff::cpu {
namespace {

using V = __m512;
using Mask = __mmask16;  // lanes of a vector that are elements
constexpr int64_t kLanes = 16;
constexpr Mask kAll = 0xFFFF;
FASTDIFF_INLINE V all(float value) { return _mm512_set1_ps(value); }

// How x lies in memory; lanes outside the mask are 0. stream() writes a whole vector past the caches, to
// an address that is aligned to it.
struct Float32 {
  using Type = float;
  static FASTDIFF_INLINE V load(const float* x, Mask m) { return _mm512_maskz_loadu_ps(m, x); }
  static FASTDIFF_INLINE void store(float* y, V value, Mask m) {
    _mm512_mask_storeu_ps(y, m, value);
  }
  static FASTDIFF_INLINE void stream(float* y, V value) { _mm512_stream_ps(y, value); }
};

struct BFloat16 {
  using Type = uint16_t;
  static FASTDIFF_INLINE V load(const uint16_t* x, Mask m) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  // The conversion instruction writes results below 2^-126 as 0.
  static FASTDIFF_INLINE void store(uint16_t* y, V value, Mask m) {
    _mm256_mask_storeu_epi16(y, m, (__m256i)_mm512_cvtneps_pbh(value));
  }
  static FASTDIFF_INLINE void stream(uint16_t* y, V value) {
    _mm256_stream_si256((__m256i*)y, (__m256i)_mm512_cvtneps_pbh(value));
  }
};

struct Float16 {
  using Type = uint16_t;
  static FASTDIFF_INLINE V load(const uint16_t* x, Mask m) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, x));
  }
  static FASTDIFF_INLINE void store(uint16_t* y, V value, Mask m) {
    _mm256_mask_storeu_epi16(y, m, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static FASTDIFF_INLINE void stream(uint16_t* y, V value) {
    _mm256_stream_si256((__m256i*)y, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
};

// 2^(j/16), less j in the exponent's lowest bits and the fraction above them: adding (16 n + j) << 19 to
// entry j gives 2^(n + j/16).
alignas(64) constexpr uint32_t kPowers[16] = {
    0x3F800000u, 0x3F7DAAC3u, 0x3F7B95C2u, 0x3F79C3D3u, 0x3F7837F0u, 0x3F76F532u,
    0x3F75FED7u, 0x3F75583Fu, 0x3F7504F3u, 0x3F7508A4u, 0x3F75672Au, 0x3F76248Cu,
    0x3F7744FDu, 0x3F78CCDFu, 0x3F7AC0C7u, 0x3F7D257Du};

// 1 + exp(-z) as in fastdiff/sigmoid.h, within 4 ulps, for z brought into [-88.7, 87], where its
// reciprocal is below 2^-127 and 1. NaN stays NaN. With sixteen powers in a register |r| is at most
// ln(2) / 32, and a polynomial of degree 3 does what takes degree 5 there.
FASTDIFF_INLINE V one_plus_exp_minus(V z) {
  const V c = _mm512_min_ps(all(87.0f), _mm512_max_ps(all(-88.7f), z));
  const V shifted = _mm512_fnmadd_ps(c, all(16 * 1.44269504f), all(12582912.0f));
  const V n = _mm512_sub_ps(shifted, all(12582912.0f));
  const V r = _mm512_fnmsub_ps(n, all(0.693147182f / 16), c);
  const __m512i bits = _mm512_castps_si512(shifted);
  const __m512i power = _mm512_permutexvar_epi32(bits, _mm512_load_si512(kPowers));
  const V scale = _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(bits, 19)));
  V p = _mm512_fmadd_ps(r, all(0.166666667f), all(0.5f));
  p = _mm512_fmadd_ps(p, r, all(1.0f));
  p = _mm512_fmadd_ps(p, r, all(1.0f));
  return _mm512_fmadd_ps(scale, p, all(1.0f));
}

struct SiLU {
  static FASTDIFF_INLINE V value(V z) { return _mm512_div_ps(z, one_plus_exp_minus(z)); }
  static FASTDIFF_INLINE V slope(V z) {
    const V s = _mm512_div_ps(all(1.0f), one_plus_exp_minus(z));
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(s, s, s), z, s);
  }
};

struct Identity {
  static FASTDIFF_INLINE V value(V z) { return z; }
  static FASTDIFF_INLINE V slope(V) { return all(1.0f); }
};

// Calls body(i, mask) for the vectors of n elements.
template <typename Body>
FASTDIFF_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kAll);
  if (i < n) body(i, static_cast<Mask>((1u << (n - i)) - 1));
}

// Bytes from the last address before y to which a vector of results is aligned.
template <typename T>
FASTDIFF_INLINE int64_t misaligned_bytes(const T* y) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(y) % (kLanes * sizeof(T)));
}

// y[i] = value(i, mask) for n elements, past the caches if kStream.
template <typename S, bool kStream, typename Value>
FASTDIFF_INLINE void write_run(typename S::Type* y, int64_t n, const Value& value) {
  const auto write = [&](int64_t i, Mask m) FASTDIFF_LAMBDA { S::store(y + i, value(i, m), m); };
  if constexpr (!kStream) return for_vectors(n, write);
  constexpr int64_t size = sizeof(typename S::Type);
  int64_t i = std::min(n, (kLanes * size - misaligned_bytes(y)) / size % kLanes);
  if (i) write(0, static_cast<Mask>((1u << i) - 1));
  for (; i + kLanes <= n; i += kLanes) S::stream(y + i, value(i, kAll));
  if (i < n) write(i, static_cast<Mask>((1u << (n - i)) - 1));
}

// The same for one vector of a channels_last result, whose stores are aligned if kStream.
template <typename S, bool kStream>
FASTDIFF_INLINE void write_vector(typename S::Type* y, V value, Mask m) {
  if constexpr (kStream) {
    S::stream(y, value);
  } else {
    S::store(y, value, m);
  }
}

// Whether every vector of a channels_last result is aligned.
template <typename T>
FASTDIFF_INLINE bool are_vectors_aligned(const T* y, int64_t channels) {
  return channels % kLanes == 0 && misaligned_bytes(y) == 0;
}

// The sums over the lanes of four vectors, at a third of the cost of four single sums.
FASTDIFF_INLINE __m128 sums_of(const V v[4]) {
  const V ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const V cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const V abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Calls row_body(row, j) for four rows at a time, j in [0, 4), then done(first row, mask of rows).
template <typename RowBody, typename Done>
FASTDIFF_INLINE void for_four_rows(int64_t rows, const RowBody& row_body, const Done& done) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
#pragma GCC unroll 4  // so that what belongs to each j stays in registers
    for (int64_t j = 0; j < 4; ++j) row_body(row + j, j);
    done(row, __mmask8{0xF});
  }
  if (row < rows) {
    for (int64_t j = 0; row + j < rows; ++j) row_body(row + j, j);
    done(row, static_cast<__mmask8>((1u << (rows - row)) - 1));
  }
}

// Calls body<count>(pixel, c, mask) for the vectors of channels of blocks of `count` pixels, so that
// what belongs to channels is loaded and stored once per block.
template <int kBlock, typename Body>
FASTDIFF_INLINE void for_pixel_blocks(int64_t pixels, int64_t channels, const Body& body) {
  int64_t p = 0;
  for (; p + kBlock <= pixels; p += kBlock) {
    for_vectors(channels, [&](int64_t c, Mask m) FASTDIFF_LAMBDA {
      body.template operator()<kBlock>(p, c, m);
    });
  }
  for (; p < pixels; ++p) {
    for_vectors(channels, [&](int64_t c, Mask m) FASTDIFF_LAMBDA {
      body.template operator()<1>(p, c, m);
    });
  }
}

// Blocks of pixels are read across the lines of memory, an order that the hardware does not foresee:
// asks for what the block after the next one reads in this place.
template <int kBlock, typename T>
FASTDIFF_INLINE void prefetch(const T* x, int64_t channels) {
  _mm_prefetch(reinterpret_cast<const char*>(x + 2 * kBlock * channels), _MM_HINT_T0);
}

template <typename S>
FASTDIFF_INLINE const typename S::Type* in(const void* data) {
  return static_cast<const typename S::Type*>(data);
}
template <typename S>
FASTDIFF_INLINE typename S::Type* out(void* data) {
  return static_cast<typename S::Type*>(data);
}

template <typename S, typename A>
struct Kernels {
  static void row_sums(const void* x_data, int64_t rows, int64_t n, const float* k, float* sum,
                       float* square) {
    V s[4]{}, q[4]{};
    for_four_rows(
        rows,
        [&](int64_t row, int64_t j) FASTDIFF_LAMBDA {
          const auto* x = in<S>(x_data) + row * n;
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
    for_pixel_blocks<8>(pixels, channels, [&]<int kCount>(int64_t p, int64_t c, Mask m)
                                              FASTDIFF_LAMBDA {
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
                                         const float* slope, const float* offset) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto* x = in<S>(x_data) + row * n;
      const V a = all(slope[row]), b = all(offset[row]);
      write_run<S, kStream>(out<S>(y_data) + row * n, n, [&](int64_t i, Mask m) FASTDIFF_LAMBDA {
        return A::value(_mm512_fmadd_ps(a, S::load(x + i, m), b));
      });
    }
  }

  static void row_apply(const void* x, void* y, int64_t rows, int64_t n, const float* slope,
                        const float* offset, bool stream) {
    if (stream) return row_apply_<true>(x, y, rows, n, slope, offset);
    row_apply_<false>(x, y, rows, n, slope, offset);
  }

  template <bool kStream>
  static FASTDIFF_INLINE void pixel_apply_(const void* x_data, void* y_data, int64_t pixels,
                                           int64_t channels, const float* slope,
                                           const float* offset) {
    for_pixel_blocks<4>(pixels, channels, [&]<int kCount>(int64_t p, int64_t c, Mask m)
                                              FASTDIFF_LAMBDA {
      const V a = Float32::load(slope + c, m), b = Float32::load(offset + c, m);
      for (int j = 0; j < kCount; ++j) {
        const int64_t i = (p + j) * channels + c;
        prefetch<kCount>(in<S>(x_data) + i, channels);
        const V z = _mm512_fmadd_ps(a, S::load(in<S>(x_data) + i, m), b);
        write_vector<S, kStream>(out<S>(y_data) + i, A::value(z), m);
      }
    });
  }

  static void pixel_apply(const void* x, void* y, int64_t pixels, int64_t channels,
                          const float* slope, const float* offset, bool stream) {
    if (stream && are_vectors_aligned(out<S>(y), channels)) {
      return pixel_apply_<true>(x, y, pixels, channels, slope, offset);
    }
    pixel_apply_<false>(x, y, pixels, channels, slope, offset);
  }

  static FASTDIFF_INLINE V dz_of(V grad, V d, V slope, V offset) {
    return _mm512_mul_ps(grad, A::slope(_mm512_fmadd_ps(slope, d, offset)));
  }

  template <bool kKeep>
  static FASTDIFF_INLINE void row_grad_sums_(const void* x_data, const void* grad_data, int64_t rows,
                                             int64_t n, const float* k, const float* slope,
                                             const float* offset, float* kept, float* s0, float* s1,
                                             float* s2) {
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
          _mm_mask_storeu_ps(s2 + row, m, sums_of(t2));
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
    for_pixel_blocks<4>(pixels, channels, [&]<int kCount>(int64_t p, int64_t c, Mask m)
                                              FASTDIFF_LAMBDA {
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

  // grad_x of the vector at element i; the other arguments are the coefficients of its row or channels.
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
  static void row_grad_x_(const void* x, const void* grad, const float* kept,
                                          void* grad_x, int64_t rows, int64_t n, const float* k,
                                          const float* slope, const float* offset, const float* a,
                                          const float* b, const float* c) {
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
  static void pixel_grad_x_(const void* x, const void* grad, const float* kept,
                                            void* grad_x, int64_t pixels, int64_t channels,
                                            const float* k, const float* slope, const float* offset,
                                            const float* a, const float* b, const float* constant) {
    for_pixel_blocks<4>(pixels, channels, [&]<int kCount>(int64_t p, int64_t c, Mask m)
                                              FASTDIFF_LAMBDA {
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
