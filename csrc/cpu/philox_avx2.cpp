// Philox words with AVX2. GCC vectorizes the plain loop with two shuffles per multiplication; here a
// counter's words lie in 64-bit lanes, where one vpmuludq gives both halves of a product and ignores
// what the last round left above bit 31. Measured: 0.75 ns an element instead of 2.2 (one thread).

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2")  // for this file only; the caller asks the CPU first
#endif

#include "philox_words.h"

#if FASTDIFF_HAS_PHILOX_AVX2

#include <immintrin.h>

#include "fastdiff/philox.h"

namespace fastdiff::cpu {
namespace {

typedef uint64_t U64x4 __attribute__((vector_size(32)));

struct WideMultiply4 {
  FASTDIFF_HD void operator()(uint32_t m, U64x4 c, U64x4& high, U64x4& low) const {
    low = (U64x4)_mm256_mul_epu32(_mm256_set1_epi64x(m), (__m256i)c);
    high = low >> 32;
  }
};

// Blocks first, first + 2, first + 4, first + 6.
FASTDIFF_HD void every_second(uint64_t first, uint64_t stream, uint64_t key, U64x4 w[4]) {
  const U64x4 block = first + U64x4{0, 2, 4, 6};
  w[0] = block;
  w[1] = block >> 32;
  w[2] = stream + U64x4{};
  w[3] = (stream >> 32) + U64x4{};
  philox_rounds(w[0], w[1], w[2], w[3], key, WideMultiply4{});
}

}  // namespace

bool has_avx2() { return __builtin_cpu_supports("avx2"); }

void philox_words_avx2(uint64_t key, uint64_t stream, uint64_t first, PhiloxWords& words) {
  for (int lane = 0; lane < kPhiloxLanes; lane += 8) {
    U64x4 even[4], odd[4];
    every_second(first + lane, stream, key, even);
    every_second(first + lane + 1, stream, key, odd);
    for (int k = 0; k < 4; ++k) {
      const __m256i joined =
          _mm256_blend_epi32((__m256i)even[k], (__m256i)(odd[k] << 32), 0xAA);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words.w[k] + lane), joined);
    }
  }
}

}  // namespace fastdiff::cpu

#endif
