#pragma once

// Thread-block clusters (PTX, sm_90 and newer). Earlier architectures compile to nothing: there the
// host never launches a cluster.

#include <cstdint>

namespace fastdiff {

// Each thread of the cluster arrives, and later waits for all others to have arrived. What it wrote
// before is visible to them after.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Arrives without making anything visible: what the thread has read from the others it has, and it
// will not read more.
__device__ __forceinline__ void cluster_leave() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

// The value at the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float load_from_cluster(const float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  float value;
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
#else
  return *shared;
#endif
}

}  // namespace fastdiff
