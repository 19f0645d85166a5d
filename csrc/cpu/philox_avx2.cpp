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

void philox_words_avx2(uint64_t key, uint64_t stream, uint64_t first, PhiloxWords& words) {
  const U64x4 evens{0, 2, 4, 6};
  for (int lane = 0; lane < kPhiloxLanes; lane += 8) {
    U64x4 even[4], odd[4];
    philox_lanes(first + lane, evens, stream, key, WideMultiply4{}, even);
    philox_lanes(first + lane + 1, evens, stream, key, WideMultiply4{}, odd);
    for (int k = 0; k < 4; ++k) {
      const __m256i joined = _mm256_blend_epi32((__m256i)even[k], (__m256i)(odd[k] << 32), 0xAA);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words.w[k] + lane), joined);
    }
  }
}

}  // namespace fastdiff::cpu

#endif
