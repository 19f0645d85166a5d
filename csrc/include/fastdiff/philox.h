#pragma once

// Noise as a pure function of (key, stream, element): docs/mathematics.md §9.
//
// Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
// SplitMix64: Steele, Lea & Flood 2014. Nothing here calls libm, so that the CPU compiler
// vectorizes it and both compilers give the same normals up to the contraction of multiply-adds.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fastdiff/macros.h"

namespace fastdiff {

// Key of sample k of a call with an integer seed: output number k + 1 of SplitMix64(seed).
FASTDIFF_HD uint64_t sample_key(uint64_t seed, uint64_t k) {
  uint64_t z = seed + (k + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

enum class NoiseMode : int32_t {
  kNone,
  kGiven,
  kGenerated,
};

// Where a call's keys come from: given per sample, or derived from one seed.
struct NoiseSource {
  const int64_t* keys;  // (B,) or null
  uint64_t seed;
  uint64_t stream;

  FASTDIFF_HD uint64_t key(int64_t sample) const {
    return keys ? static_cast<uint64_t>(keys[sample]) : sample_key(seed, sample);
  }
};

struct Words {
  uint32_t w0, w1, w2, w3;
};

struct Normals {
  float n0, n1, n2, n3;
};

// Ten rounds on one counter, or on a vector of counters. U holds the words; `wide(m, c, high, low)`
// multiplies a constant with the low 32 bits of c, and leaves what it likes above bit 31.
template <typename U, typename Wide>
FASTDIFF_HD void philox_rounds(U& c0, U& c1, U& c2, U& c3, uint64_t key, const Wide& wide) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    wide(0xD2511F53u, c0, high0, low0);
    wide(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

struct WideMultiply {
  FASTDIFF_HD void operator()(uint32_t m, uint32_t c, uint32_t& high, uint32_t& low) const {
    high = static_cast<uint32_t>((static_cast<uint64_t>(m) * c) >> 32);
    low = m * c;
  }
};

// The words of the block with counter (block_low, block_high, stream).
FASTDIFF_HD Words philox4x32(uint32_t block_low, uint32_t block_high, uint64_t stream,
                             uint64_t key) {
  Words w{block_low, block_high, static_cast<uint32_t>(stream),
          static_cast<uint32_t>(stream >> 32)};
  philox_rounds(w.w0, w.w1, w.w2, w.w3, key, WideMultiply{});
  return w;
}

FASTDIFF_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FASTDIFF_HD uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// uint32 to the nearest float. Before AVX-512 there is no vector instruction for it, but both
// halves convert exactly and their sum rounds once.
FASTDIFF_HD float to_float(uint32_t w) {
#if defined(__CUDA_ARCH__)
  return __uint2float_rn(w);
#else
  return static_cast<float>(static_cast<int32_t>(w >> 16)) * 65536.0f +
         static_cast<float>(static_cast<int32_t>(w & 0xFFFFu));
#endif
}

// Natural logarithm of a positive normal float, to 0.7 ulp (measured over (2^-32, 1]): x = m 2^e
// with m in [sqrt(1/2), sqrt(2)), log(m) = d - d^2/2 + d^3 P(d) with d = m - 1 exact, ln 2 in two
// parts.
FASTDIFF_HD float log_positive(float x) {
  const uint32_t bits = float_to_bits(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float d = bits_to_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  float p = -0.07902744f;
  p = p * d + 0.12622319f;
  p = p * d - 0.12998183f;
  p = p * d + 0.14214496f;
  p = p * d - 0.16641282f;
  p = p * d + 0.20001045f;
  p = p * d - 0.25000307f;
  p = p * d + 0.3333333f;
  const float d2 = d * d;
  float y = p * (d2 * d);
  y = e * -2.12194440e-4f + y;
  y = d2 * -0.5f + y;
  return e * 0.693359375f + (d + y);
}

// Sine and cosine of 2 pi w / 2^32 where the fraction is rounded to float first. The reduction to
// an eighth of a turn is exact; the polynomials are within 1.1 ulp.
FASTDIFF_HD void sincos_turns(uint32_t w, float& sin_out, float& cos_out) {
  const float quarters = to_float(w) * 9.31322574615478515625e-10f;  // 2^-30: in [0, 4]
  const int32_t quadrant = static_cast<int32_t>(quarters + 0.5f);
  const float f = quarters - static_cast<float>(quadrant);
  const float z = f * f;
  float s = 1.582063e-4f;
  s = s * z - 4.6812664e-3f;
  s = s * z + 7.969258e-2f;
  s = s * z - 6.459641e-1f;
  s = s * z + 1.5707964f;
  s = s * f;
  float c = 9.0362807e-4f;
  c = c * z - 2.086007e-2f;
  c = c * z + 2.536692e-1f;
  c = c * z - 1.2337005f;
  c = c * z + 1.0f;
  const bool swap = quadrant & 1;
  const uint32_t sin_sign = static_cast<uint32_t>(quadrant & 2) << 30;
  const uint32_t cos_sign = static_cast<uint32_t>((quadrant + 1) & 2) << 30;
  sin_out = bits_to_float(float_to_bits(swap ? c : s) ^ sin_sign);
  cos_out = bits_to_float(float_to_bits(swap ? s : c) ^ cos_sign);
}

// Two words to two standard normals (Box-Muller).
FASTDIFF_HD void box_muller(uint32_t w0, uint32_t w1, float& n0, float& n1) {
  const float u1 = to_float(w0) * 2.3283064365386962890625e-10f + 2.3283064365386962890625e-10f;
  float sine, cosine;
  sincos_turns(w1, sine, cosine);
  const float radius = sqrtf(-2.0f * log_positive(u1));
  n0 = radius * cosine;
  n1 = radius * sine;
}

// The four normals of elements 4 block .. 4 block + 3.
FASTDIFF_HD Normals normal_block(uint64_t key, uint64_t stream, uint64_t block) {
  const Words words =
      philox4x32(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, key);
  Normals n;
  box_muller(words.w0, words.w1, n.n0, n.n1);
  box_muller(words.w2, words.w3, n.n2, n.n3);
  return n;
}

}  // namespace fastdiff
