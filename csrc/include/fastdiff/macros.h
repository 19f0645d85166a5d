#pragma once

// Formulas are written once, inline, for the CPU and the CUDA compiler.
#if defined(__CUDACC__)
#define FASTDIFF_HD __host__ __device__ __forceinline__
#else
#define FASTDIFF_HD inline __attribute__((always_inline))
#endif
