// Thread-block clusters and distributed shared memory, right and wrong.
#include <cooperative_groups.h>

#include <cstdint>

namespace cg = cooperative_groups;

// 16 numbers per block.
extern "C" __global__ void identity(int* out) {
  auto cluster = cg::this_cluster();
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int* row = out + 16 * block;
  uint32_t id, count, is_explicit;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  asm("mov.u32 %0, %%nclusterid.y;" : "=r"(count));
  asm("{ .reg .pred p; mov.pred p, %%is_explicit_cluster; selp.u32 %0, 1, 0, p; }"
      : "=r"(is_explicit));
  if (threadIdx.x) return;
  row[0] = cluster.block_rank();
  row[1] = cluster.num_blocks();
  row[2] = cluster.block_index().x;
  row[3] = cluster.block_index().y;
  row[4] = cluster.dim_blocks().x;
  row[5] = cluster.dim_blocks().y;
  row[6] = id;
  row[7] = count;
  row[8] = is_explicit;
  row[9] = cluster.thread_rank();
  row[10] = cluster.num_threads();
}

// The sum over a cluster, as every block of it computes it. Defects: 1 no barrier before reading,
// 2 no barrier before the blocks end, 3 the first barrier does not order memory.
template <int kDefect>
__device__ void sum_of_cluster(const float* x, float* out) {
  __shared__ float values[64];
  auto cluster = cg::this_cluster();
  int i = blockIdx.x * 64 + threadIdx.x;
  values[threadIdx.x] = x[i];
  if (kDefect == 3) {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  } else if (kDefect != 1) {
    cluster.sync();
  }
  float sum = 0;
  for (int rank = 0; rank < cluster.num_blocks(); rank++)
    sum += cluster.map_shared_rank(values, rank)[threadIdx.x];
  out[i] = sum;
  if (kDefect != 2) cluster.sync();
}
extern "C" __global__ void cluster_sum(const float* x, float* out) {
  sum_of_cluster<0>(x, out);
}
extern "C" __global__ void __cluster_dims__(4) cluster_sum_of_4(const float* x, float* out) {
  sum_of_cluster<0>(x, out);
}
extern "C" __global__ void cluster_sum_without_start(const float* x, float* out) {
  sum_of_cluster<1>(x, out);
}
extern "C" __global__ void cluster_sum_without_end(const float* x, float* out) {
  sum_of_cluster<2>(x, out);
}
extern "C" __global__ void cluster_sum_relaxed(const float* x, float* out) {
  sum_of_cluster<3>(x, out);
}

// Two rounds through one buffer: the second overwrites what other blocks may still read.
template <bool kWithBarrier>
__device__ void two_rounds(float* out) {
  __shared__ float value;
  auto cluster = cg::this_cluster();
  for (int round = 0; round < 2; round++) {
    if (threadIdx.x == 0) value = blockIdx.x + 10.f * round;
    cluster.sync();
    int next = (cluster.block_rank() + 1) % cluster.num_blocks();
    if (threadIdx.x == 32)
      out[gridDim.x * round + blockIdx.x] = *cluster.map_shared_rank(&value, next);
    if (kWithBarrier) cluster.sync();
  }
  if (!kWithBarrier) cluster.sync();
}
extern "C" __global__ void rounds_with_barrier(float* out) {
  two_rounds<true>(out);
}
extern "C" __global__ void rounds_without_barrier(float* out) {
  two_rounds<false>(out);
}

// Arrive, work on private data, wait: the block's own work may overlap the barrier.
extern "C" __global__ void split_barrier(const float* x, float* out) {
  __shared__ float value;
  auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) value = x[blockIdx.x];
  __syncthreads();
  auto token = cluster.barrier_arrive();
  float own = 2 * x[blockIdx.x];
  cluster.barrier_wait(static_cast<decltype(token)&&>(token));
  if (threadIdx.x == 0) out[blockIdx.x] = own + *cluster.map_shared_rank(&value, 0);
  cluster.sync();
}

// The PTX instructions on 32-bit addresses: every thread adds to counters in block 0 and leaves its
// rank with the next block.
extern "C" __global__ void window_addresses(int* out) {
  __shared__ int counters[2];
  __shared__ int from;
  auto cluster = cg::this_cluster();
  uint32_t rank = cluster.block_rank(), next = (rank + 1) % cluster.num_blocks();
  if (threadIdx.x == 0) counters[0] = counters[1] = from = 0;
  cluster.sync();
  uint32_t own = (uint32_t)__cvta_generic_to_shared(counters);
  uint32_t mine = (uint32_t)__cvta_generic_to_shared(&from);
  uint32_t first, neighbour, old, seen, owner;
  asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(first) : "r"(own));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(neighbour) : "r"(mine), "r"(next));
  asm volatile("atom.shared::cluster.add.u32 %0, [%1], 1;" : "=r"(old) : "r"(first) : "memory");
  asm volatile("red.shared::cluster.add.u32 [%0+4], 2;" ::"r"(first) : "memory");
  asm volatile("getctarank.shared::cluster.u32 %0, %1;" : "=r"(owner) : "r"(neighbour));
  if (threadIdx.x == 0)
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(neighbour), "r"(100 + rank) : "memory");
  cluster.sync();
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(seen) : "r"(first) : "memory");
  if (threadIdx.x == 0) {
    int* remote = cluster.map_shared_rank(counters, next);
    int in_block, in_cluster;
    asm("{ .reg .pred p; isspacep.shared::cta p, %1; selp.s32 %0, 1, 0, p; }"
        : "=r"(in_block)
        : "l"(remote));
    asm("{ .reg .pred p; isspacep.shared::cluster p, %1; selp.s32 %0, 1, 0, p; }"
        : "=r"(in_cluster)
        : "l"(remote));
    int* row = out + 8 * blockIdx.x;
    row[0] = seen;
    row[1] = counters[1];
    row[2] = from;
    row[3] = owner;
    row[4] = cluster.query_shared_rank(remote);
    row[5] = in_block;
    row[6] = in_cluster;
  }
  cluster.sync();
}

// Block 0 of a cluster writes global memory, the others read it; `shared_by` blocks use one value.
template <bool kWithBarrier>
__device__ void publish(float* y, float* out, int shared_by) {
  auto cluster = cg::this_cluster();
  int id = blockIdx.x / shared_by;
  if (cluster.block_rank() == 0 && threadIdx.x == 0) y[id] = 3;
  if (kWithBarrier) cluster.sync();
  if (cluster.block_rank() && threadIdx.x == 0) out[blockIdx.x] = y[id];
}
extern "C" __global__ void publish_with_barrier(float* y, float* out, int shared_by) {
  publish<true>(y, out, shared_by);
}
extern "C" __global__ void publish_without_barrier(float* y, float* out, int shared_by) {
  publish<false>(y, out, shared_by);
}

extern "C" __global__ void one_block_stays_away(float* out) {
  if (cg::this_cluster().block_rank() == 0) {
    while (out[0] == 0) __syncthreads();
  }
  cg::this_cluster().sync();
}

extern "C" __global__ void wrong_rank(float* out) {
  __shared__ float value;
  auto cluster = cg::this_cluster();
  value = 1;
  cluster.sync();
  out[threadIdx.x] = *cluster.map_shared_rank(&value, cluster.num_blocks());
  cluster.sync();
}

extern "C" __global__ void past_the_end(float* out) {
  __shared__ float values[32];
  auto cluster = cg::this_cluster();
  values[threadIdx.x] = 1;
  cluster.sync();
  out[threadIdx.x] = cluster.map_shared_rank(values, 0)[threadIdx.x + 1];
  cluster.sync();
}

extern "C" __global__ void diverging_arrival(float* out) {
  if (threadIdx.x < 16) {
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
    out[threadIdx.x] = 1;
  } else {
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
    out[threadIdx.x] = 2;
  }
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

extern "C" __global__ void arrive_twice(float* out) {
  asm volatile("barrier.cluster.arrive;" ::: "memory");
  asm volatile("barrier.cluster.arrive;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
  out[threadIdx.x] = 1;
}
