#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTDIFF_HAS_PHILOX_X86 1
#else
#define FASTDIFF_HAS_PHILOX_X86 0
#endif

namespace fastdiff::cpu {

constexpr int kPhiloxLanes = 16;

// Word k of block first + lane is w[k][lane].
struct PhiloxWords {
  uint32_t w[4][kPhiloxLanes];
};

#if FASTDIFF_HAS_PHILOX_X86
void philox_words_avx2(uint64_t key, uint64_t stream, uint64_t first, PhiloxWords& words);
void philox_words_avx512(uint64_t key, uint64_t stream, uint64_t first, PhiloxWords& words);
#endif

}  // namespace fastdiff::cpu
