#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f")  // for this file only; the caller asks the CPU first
#endif

#include "philox_words.h"

#if FASTDIFF_HAS_PHILOX_X86

#include <immintrin.h>

#include "philox_lanes.h"

namespace fastdiff::cpu {
namespace {

typedef uint64_t U64x8 __attribute__((vector_size(64)));

struct WideMultiply8 {
  FASTDIFF_HD void operator()(uint32_t m, U64x8 c, U64x8& high, U64x8& low) const {
    low = (U64x8)_mm512_mul_epu32(_mm512_set1_epi64(m), (__m512i)c);
    high = low >> 32;
  }
};

}  // namespace

void philox_words_avx512(uint64_t key, uint64_t stream, const uint64_t* blocks,
                         PhiloxWords& words) {
  static_assert(kPhiloxLanes == 16);
  U64x8 low[4], high[4];
  philox_lanes((U64x8)_mm512_loadu_si512(blocks), stream, key, WideMultiply8{}, low);
  philox_lanes((U64x8)_mm512_loadu_si512(blocks + 8), stream, key, WideMultiply8{}, high);
  const __m512i halves =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  for (int k = 0; k < 4; ++k) {
    const __m512i joined = _mm512_permutex2var_epi32((__m512i)low[k], halves, (__m512i)high[k]);
    _mm512_storeu_si512(words.w[k], joined);
  }
}

}  // namespace fastdiff::cpu

#endif
