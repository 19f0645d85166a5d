#include "simd.h"

#if FASTDIFF_HAS_CLONES
// The standard library's headers come first: nothing of them is compiled for AVX2.
#include <algorithm>
#include <cstring>
#include <utility>

#include "winograd_conv.h"
#pragma GCC target("arch=x86-64-v3")  // from here on; the caller asks the CPU first
#include "winograd_conv_loops.h"

namespace fastdiff::cpu {

// 12 accumulators, two columns and a row of 16 registers.
typedef float Vector __attribute__((vector_size(32)));
WinogradLoops winograd_loops_avx2() { return Winograd<Vector, 6>::loops(); }

}  // namespace fastdiff::cpu
#endif
