// Blocks that share global memory, right and wrong.

// Block b writes `count` elements from 128 b on.
extern "C" __global__ void fill_rows(float* y, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) y[blockIdx.x * 128 + i] = blockIdx.x;
}

extern "C" __global__ void fill_rows_with_ones(float* y, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) y[blockIdx.x * 128 + i] = 1;
}

// y may be x: then a block reads what its neighbour writes.
extern "C" __global__ void smooth(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float next = i + 1 < n ? x[i + 1] : 0;
  y[i] = x[i] + next;
}

extern "C" __global__ void sum_with_atomics(const float* x, float* sum) {
  atomicAdd(sum, x[blockIdx.x * blockDim.x + threadIdx.x]);
}
extern "C" __global__ void sum_without_atomics(const float* x, float* sum) {
  if (threadIdx.x == 0) *sum += x[blockIdx.x * blockDim.x];
}
extern "C" __global__ void sum_and_look(const float* x, float* sum, float* seen) {
  atomicAdd(sum, x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) seen[blockIdx.x] = *sum;
}

// The last block to finish adds what the others wrote (threadFenceReduction of the CUDA samples).
template <bool kFence>
__device__ void two_stage_sum(const float* x, float* partial, int* ticket, float* sum) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    float s = 0;
    for (int i = 0; i < 64; i++) s += x[blockIdx.x * 64 + i];
    partial[blockIdx.x] = s;
    if (kFence) __threadfence();
    is_last = atomicAdd(ticket, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last || threadIdx.x) return;
  float s = 0;
  for (int i = 0; i < gridDim.x; i++) s += partial[i];
  *sum = s;
}
extern "C" __global__ void last_block_sum(const float* x, float* partial, int* ticket, float* sum) {
  two_stage_sum<true>(x, partial, ticket, sum);
}
extern "C" __global__ void last_block_sum_without_fence(const float* x, float* partial, int* ticket,
                                                        float* sum) {
  two_stage_sum<false>(x, partial, ticket, sum);
}

// Block b waits for block b - 1 and continues its prefix sum; order: 0 fence and volatile flag,
// 1 no fence, 2 release and acquire.
template <int kOrder>
__device__ void chain(const float* x, float* total, volatile int* flags) {
  if (threadIdx.x) return;
  int b = blockIdx.x;
  int* mine = (int*)flags + b;
  float before = 0;
  if (b > 0) {
    if (kOrder == 2) {
      int ready = 0;
      while (!ready)
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(ready) : "l"(mine - 1) : "memory");
    } else {
      while (!flags[b - 1]) {
      }
    }
    before = total[b - 1];
  }
  total[b] = before + x[b];
  if (kOrder == 0) __threadfence();
  if (kOrder == 2) {
    asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(mine), "r"(1) : "memory");
  } else {
    flags[b] = 1;
  }
}
extern "C" __global__ void chain_with_fence(const float* x, float* total, int* flags) {
  chain<0>(x, total, flags);
}
extern "C" __global__ void chain_without_fence(const float* x, float* total, int* flags) {
  chain<1>(x, total, flags);
}
extern "C" __global__ void chain_with_release(const float* x, float* total, int* flags) {
  chain<2>(x, total, flags);
}
