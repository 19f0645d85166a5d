#include "simd.h"

#if FASTDIFF_HAS_CLONES
// The standard library's headers come first: nothing of them is compiled for AVX-512.
#include <algorithm>
#include <cstring>
#include <utility>

#include "winograd_conv.h"
#pragma GCC target("arch=x86-64-v4")  // from here on; the caller asks the CPU first
#include "winograd_conv_loops.h"

namespace fastdiff::cpu {

// 28 accumulators, two columns and a row of 32 registers.
typedef float Vector __attribute__((vector_size(64)));
WinogradLoops winograd_loops_avx512() { return Winograd<Vector, 14>::loops(); }

}  // namespace fastdiff::cpu
#endif
