#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastdiff {

// Launches a kernel and returns the error of this very launch. `<<<>>>` returns none, and
// cudaGetLastError() would return, and take away, what other code left behind.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), int64_t blocks, dim3 threads,
                          int64_t shared_bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace fastdiff
