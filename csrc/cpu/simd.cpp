#include "simd.h"

#include <cstdlib>
#include <cstring>

namespace fastdiff::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

// Where loops have no clones, Philox still has code of its own for both.
Isa best_isa() {
#if FASTDIFF_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::kAvx2;
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx512f")) return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa chosen_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("FASTDIFF_CPU_ISA");
  for (int32_t i = 0; wanted && i <= static_cast<int32_t>(best); ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<Isa>(i);
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

std::vector<const char*> isa_names() {
  return {kNames, kNames + static_cast<int32_t>(best_isa()) + 1};
}

const char* simd_level() {
#if FASTDIFF_HAS_CLONES
  switch (isa()) {
    case Isa::kAvx512:
      return "x86-64-v4 (AVX-512)";
    case Isa::kAvx2:
      return "x86-64-v3 (AVX2)";
    default:
      return "portable";
  }
#else
  return "the compiler's baseline (GCC 12 or newer builds for AVX2 and AVX-512 too)";
#endif
}

}  // namespace fastdiff::cpu
