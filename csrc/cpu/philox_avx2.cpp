#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2")  // for this file only; the caller asks the CPU first
#endif

#include "philox_words.h"

#if FASTDIFF_HAS_PHILOX_X86

#include <immintrin.h>

#include "philox_lanes.h"

namespace fastdiff::cpu {
namespace {

typedef uint64_t U64x4 __attribute__((vector_size(32)));

struct WideMultiply4 {
  FASTDIFF_HD void operator()(uint32_t m, U64x4 c, U64x4& high, U64x4& low) const {
    low = (U64x4)_mm256_mul_epu32(_mm256_set1_epi64x(m), (__m256i)c);
    high = low >> 32;
  }
};

}  // namespace

void philox_words_avx2(uint64_t key, uint64_t stream, const uint64_t* blocks, PhiloxWords& words) {
  const auto load = [&](int lane) {
    return (U64x4)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks + lane));
  };
  for (int lane = 0; lane < kPhiloxLanes; lane += 8) {
    U64x4 low[4], high[4];
    philox_lanes(load(lane), stream, key, WideMultiply4{}, low);
    philox_lanes(load(lane + 4), stream, key, WideMultiply4{}, high);
    for (int k = 0; k < 4; ++k) {
      const __m256 mixed = _mm256_shuffle_ps((__m256)low[k], (__m256)high[k], 0x88);
      const __m256i joined = _mm256_permute4x64_epi64((__m256i)mixed, 0xD8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words.w[k] + lane), joined);
    }
  }
}

}  // namespace fastdiff::cpu

#endif
