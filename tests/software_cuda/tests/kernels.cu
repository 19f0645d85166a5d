// Host functions with and without the mistakes that the device reports.
#include <cuda_runtime.h>

namespace {

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

}  // extern "C"
