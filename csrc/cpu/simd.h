#pragma once

#include <cstdint>
#include <vector>

// GCC knows the levels x86-64-v3 and v4 from version 12 on; elsewhere everything is built for the
// compiler's baseline only.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define FASTDIFF_HAS_CLONES 1
#else
#define FASTDIFF_HAS_CLONES 0
#endif

// For lambdas within loops that are compiled for several instruction sets.
#define FASTDIFF_LAMBDA __attribute__((always_inline))

namespace fastdiff::cpu {

// Instruction sets that loops are compiled for, each with those before it: one library runs on
// every x86-64 and still uses AVX2 or AVX-512 where they are.
enum class Isa : int32_t { kPortable, kAvx2, kAvx512 };

// The environment variable FASTDIFF_CPU_ISA, read once, or the best of this machine. A value that
// fastdiff/_native.py refuses counts as unset.
Isa isa();

// By name, those that this build has and this machine runs.
std::vector<const char*> isa_names();

// The instruction set in use, for people.
const char* simd_level();

// `clones<loop>` is a function like `loop`, an always_inline function, that is compiled for every
// instruction set and runs the one that isa() says. `loop` may be an instance of a template.
#if FASTDIFF_HAS_CLONES
template <auto kLoop>
struct Clones;

template <typename Result, typename... Args, Result (*kLoop)(Args...)>
struct Clones<kLoop> {
  __attribute__((target("arch=x86-64-v4"))) static Result avx512(Args... args) {
    return kLoop(args...);
  }
  __attribute__((target("arch=x86-64-v3"))) static Result avx2(Args... args) {
    return kLoop(args...);
  }
  static Result run(Args... args) {
    switch (isa()) {
      case Isa::kAvx512:
        return avx512(args...);
      case Isa::kAvx2:
        return avx2(args...);
      default:
        return kLoop(args...);
    }
  }
};

template <auto kLoop>
constexpr auto clones = Clones<kLoop>::run;
#else
template <auto kLoop>
constexpr auto clones = kLoop;
#endif

// For loops over F: cloned over float, as they are over double, which is for checks only.
template <typename F, auto kLoop>
constexpr auto float_clones = clones<kLoop>;
template <auto kLoop>
constexpr auto float_clones<double, kLoop> = kLoop;

}  // namespace fastdiff::cpu
