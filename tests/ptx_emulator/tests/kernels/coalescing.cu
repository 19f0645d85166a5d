// Access patterns of global memory, good and bad.
#define GLOBAL_INDEX (blockIdx.x * blockDim.x + threadIdx.x)

extern "C" __global__ void copy(const float* x, float* y, int n) {
  for (int i = GLOBAL_INDEX; i < n; i += gridDim.x * blockDim.x) y[i] = x[i];
}

extern "C" __global__ void copy4(const float4* x, float4* y, int n) {
  for (int i = GLOBAL_INDEX; i < n; i += gridDim.x * blockDim.x) y[i] = x[i];
}

extern "C" __global__ void gather(const float* x, float* y, int stride) {
  y[GLOBAL_INDEX] = x[GLOBAL_INDEX * stride];
}

extern "C" __global__ void broadcast(const float* x, float* y) {
  y[GLOBAL_INDEX] = x[GLOBAL_INDEX / 32];
}

// 32 x 32 threads transpose one tile.
extern "C" __global__ void transpose(const float* x, float* y) {
  y[threadIdx.x * 32 + threadIdx.y] = x[threadIdx.y * 32 + threadIdx.x];
}
extern "C" __global__ void transpose_in_shared(const float* x, float* y) {
  __shared__ float tile[32][33];
  tile[threadIdx.y][threadIdx.x] = x[threadIdx.y * 32 + threadIdx.x];
  __syncthreads();
  y[threadIdx.y * 32 + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}

// Odd lanes skip the first element, so that their n-th load is not that of the even ones; a
// barrier brings the warp together again.
template <bool kTogether>
__device__ void skip(const float* x, float* y) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < 2; i++) {
    if (i || threadIdx.x % 2 == 0) sum += x[i * 1024 + threadIdx.x];
    if (kTogether) __syncwarp();
  }
  y[threadIdx.x] = sum;
}
extern "C" __global__ void skip_together(const float* x, float* y) {
  skip<true>(x, y);
}

// Per-element and per-channel arrays in one instruction, depending on the lane.
extern "C" __global__ void two_arrays(const float* x, const float* w, float* y) {
  const float* source = threadIdx.x < 16 ? x : w;
  y[threadIdx.x] = source[threadIdx.x];
}
