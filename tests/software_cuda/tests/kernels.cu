// Host functions with and without the mistakes that the device reports.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

struct Padded {
  float* x;
  bool set;  // seven bytes of padding behind it
  long n;
  int value;  // four
};
struct Pointers {
  float* x[2];
  int n;  // four
};

__global__ void fill_kernel(float* x, float value, long n) {
  const long i = blockIdx.x * 128l + threadIdx.x;
  if (i < n) x[i] = value;
}

__global__ void double_kernel(const float* x, float* y, long n) {
  const long i = blockIdx.x * 128l + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}

__global__ void shared_kernel(float* x) {
  extern __shared__ float s[];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[127 - threadIdx.x];
}

__global__ void padded_kernel(Padded p) {
  if (p.set && threadIdx.x < p.n) p.x[threadIdx.x] = p.value;
}

__global__ void indexed_kernel(const __grid_constant__ Pointers p, int index) {
  if (threadIdx.x < p.n) p.x[index][threadIdx.x] = 1;
}

// A struct that still holds `address` where no member is written.
template <typename Struct>
Struct* write_everywhere(void* memory, uintptr_t address) {
  for (size_t i = 0; i < sizeof(Struct); i += 8) memcpy((char*)memory + i, &address, 8);
  return (Struct*)memory;
}

unsigned blocks(long n) { return (unsigned)((n + 127) / 128); }

}  // namespace

extern "C" {

int fill(float* x, float value, long n, cudaStream_t stream) {
  fill_kernel<<<blocks(n), 128, 0, stream>>>(x, value, n);
  return cudaGetLastError();
}
int twice(const float* x, float* y, long n, cudaStream_t stream) {
  double_kernel<<<blocks(n), 128, 0, stream>>>(x, y, n);
  return cudaGetLastError();
}
// Reverses 128 floats through `bytes` of shared memory, for which it asks only if `ask`.
int reverse(float* x, int bytes, int ask, cudaStream_t stream) {
  if (ask)
    if (cudaFuncSetAttribute(shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
      return cudaGetLastError();
  shared_kernel<<<1, 128, (size_t)bytes, stream>>>(x);
  return cudaGetLastError();
}
// `stale` is in the padding only.
int padded(float* x, uintptr_t stale, long n, cudaStream_t stream) {
  alignas(Padded) char memory[sizeof(Padded)];
  auto* p = write_everywhere<Padded>(memory, stale);
  p->x = x, p->set = true, p->n = n, p->value = 7;
  void* arguments[] = {p};
  cudaLaunchKernel((const void*)padded_kernel, dim3(1), dim3(128), arguments, 0, stream);
  return cudaGetLastError();
}
int indexed(float* x, float* y, int index, int n, cudaStream_t stream) {
  Pointers p{{x, y}, n};
  indexed_kernel<<<1, 128, 0, stream>>>(p, index);
  return cudaGetLastError();
}

}  // extern "C"
