#pragma once

// Copies from global to shared memory that pass no register (PTX cp.async, sm_80 and newer), so
// that a thread has as many under way as it likes. Where there are none, or for less than four
// bytes, a load and a store.

#include "fastdiff/vector_io.cuh"

namespace fastdiff {

// One vector. What was copied is there, for the thread itself, after wait_for_copies().
template <typename T, int V>
__device__ __forceinline__ void copy_to_shared(T* shared, const T* global) {
  using Access = typename Vector<T, V>::Access;
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Access) >= 4) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    if constexpr (sizeof(Access) == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global),
                   "n"(sizeof(Access))
                   : "memory");
    }
    return;
  }
#endif
  *reinterpret_cast<Access*>(shared) = __ldg(reinterpret_cast<const Access*>(global));
}

__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace fastdiff
