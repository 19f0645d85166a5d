#pragma once

// Functions marked FASTDIFF_CLONES are compiled for several instruction sets and chosen by the
// loader, so that one library runs on every x86-64 and still uses AVX2 or AVX-512 where they are.
// GCC knows these levels from version 12 on; other compilers build for the baseline only.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12 && !defined(__SANITIZE_ADDRESS__)
#define FASTDIFF_HAS_CLONES 1
#define FASTDIFF_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FASTDIFF_HAS_CLONES 0
#define FASTDIFF_CLONES
#endif

namespace fastdiff::cpu {

// The instruction set that the clones run with on this machine.
const char* simd_level();

}  // namespace fastdiff::cpu
