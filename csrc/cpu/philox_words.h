#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTDIFF_HAS_PHILOX_X86 1
#else
#define FASTDIFF_HAS_PHILOX_X86 0
#endif

namespace fastdiff::cpu {

constexpr int kPhiloxLanes = 16;

// Word k of a lane's block is w[k][lane].
struct PhiloxWords {
  uint32_t w[4][kPhiloxLanes];
};

// The words of any kPhiloxLanes blocks, by the best instructions that isa() allows.
using PhiloxFunction = void (*)(uint64_t key, uint64_t stream, const uint64_t* blocks,
                                PhiloxWords& words);
extern const PhiloxFunction philox_words;

#if FASTDIFF_HAS_PHILOX_X86
void philox_words_avx2(uint64_t key, uint64_t stream, const uint64_t* blocks, PhiloxWords& words);
void philox_words_avx512(uint64_t key, uint64_t stream, const uint64_t* blocks, PhiloxWords& words);
#endif

}  // namespace fastdiff::cpu
