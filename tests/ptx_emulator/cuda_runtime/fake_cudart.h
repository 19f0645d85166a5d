#pragma once

// A CUDA runtime without a device. Host code compiled by nvcc links against it instead of
// libcudart; kernel launches, and whatever depends on the device or on a kernel, are forwarded to
// hooks that Python installs (see runtime.py). Device memory is host memory, streams and events
// do nothing because every operation completes before it returns.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace emulator {

// ---- what Python provides; all return a cudaError_t ----
struct Hooks {  // mirrored by runtime.py
  int (*launch)(int image, const char* kernel, const unsigned* grid, const unsigned* block,
                uint64_t shared_bytes, void** arguments, const unsigned* cluster, int cooperative);
  int (*kernel_attribute)(int image, const char* kernel, int attribute, int64_t* value);
  int (*set_kernel_attribute)(int image, const char* kernel, int attribute, int64_t value);
  int (*resident_blocks)(int image, const char* kernel, int block_threads, uint64_t shared_bytes,
                         int* blocks);
  int (*resident_clusters)(int image, const char* kernel, int block_threads, uint64_t shared_bytes,
                           const unsigned* cluster, int* clusters);
  int (*device_attribute)(int attribute, int64_t* value);
  int (*symbol)(int image, const char* name, uint64_t* address, uint64_t* size);
};

// Numbers for kernel_attribute, besides cudaFuncAttribute values.
enum KernelAttribute { STATIC_SHARED = 100, MAX_THREADS = 101, MAX_CLUSTER_BLOCKS = 102 };

struct Kernel {
  int image;
  std::string name;
};
typedef Kernel Symbol;

// Function-local statics: nvcc's registration code runs before the constructors of these files.
inline std::unordered_map<const void*, Symbol>& symbols() {
  static std::unordered_map<const void*, Symbol> value;
  return value;
}
inline std::map<void*, size_t>& allocations() {
  static std::map<void*, size_t> value;
  return value;
}

inline Hooks hooks;
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t record(int error) {
  if (error != cudaSuccess) last_error = (cudaError_t)error;
  return (cudaError_t)error;
}

}  // namespace emulator

using namespace emulator;
