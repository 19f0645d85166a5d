// What fastdiff/_native.py asks the CPU library through ctypes: no Python here, so that the library
// serves every Python.

#include <string>

#include "../cpu/simd.h"

#define FASTDIFF_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set in use, for people.
FASTDIFF_EXPORT const char* fastdiff_simd_level() { return fastdiff::cpu::simd_level(); }

// The values of FASTDIFF_CPU_ISA that this build has and this machine runs, with spaces between.
FASTDIFF_EXPORT const char* fastdiff_isa_names() {
  static const std::string names = [] {
    std::string joined;
    for (const char* name : fastdiff::cpu::isa_names()) {
      joined += (joined.empty() ? "" : " ") + std::string(name);
    }
    return joined;
  }();
  return names.c_str();
}
