#pragma once

// What the AVX-512 loops of group_norm_silu are made of: vectors in memory, SiLU, walks over rows
// and pixels. Included by group_norm_silu_avx512.cpp alone, which sets the instruction set before
// and has included everything else, so that nothing of the standard library is compiled for
// AVX-512.

#include <immintrin.h>

#define FASTDIFF_INLINE inline __attribute__((always_inline))

namespace fastdiff::cpu {
namespace {

using V = __m512;
using Mask = __mmask16;  // lanes of a vector that are elements
constexpr int64_t kLanes = 16;
constexpr Mask kAll = 0xFFFF;
FASTDIFF_INLINE V all(float value) { return _mm512_set1_ps(value); }

// How x lies in memory; lanes outside the mask are 0. stream() writes a whole vector past the
// caches, to an address that is aligned to it.
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

// 2^(j/16), less j in the exponent's lowest bits and the fraction above them: adding (16 n + j) <<
// 19 to entry j gives 2^(n + j/16).
alignas(64) constexpr uint32_t kPowers[16] = {0x3F800000u, 0x3F7DAAC3u, 0x3F7B95C2u, 0x3F79C3D3u,
                                              0x3F7837F0u, 0x3F76F532u, 0x3F75FED7u, 0x3F75583Fu,
                                              0x3F7504F3u, 0x3F7508A4u, 0x3F75672Au, 0x3F76248Cu,
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

// Calls body<count>(pixel, c, mask) for the vectors of channels of blocks of `count` pixels, so
// that what belongs to channels is loaded and stored once per block.
template <int kBlock, typename Body>
FASTDIFF_INLINE void for_pixel_blocks(int64_t pixels, int64_t channels, const Body& body) {
  int64_t p = 0;
  for (; p + kBlock <= pixels; p += kBlock) {
    for_vectors(channels, [&](int64_t c, Mask m)
                              FASTDIFF_LAMBDA { body.template operator()<kBlock>(p, c, m); });
  }
  for (; p < pixels; ++p) {
    for_vectors(channels,
                [&](int64_t c, Mask m) FASTDIFF_LAMBDA { body.template operator()<1>(p, c, m); });
  }
}

// Blocks of pixels are read across the lines of memory, an order that the hardware does not
// foresee: asks for what the block after the next one reads in this place.
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

}  // namespace
}  // namespace fastdiff::cpu
