#include "simd.h"

namespace fastdiff::cpu {

const char* simd_level() {
#if FASTDIFF_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64";
#else
  return "the compiler's baseline (GCC 12 or newer builds for AVX2 and AVX-512 too)";
#endif
}

}  // namespace fastdiff::cpu
