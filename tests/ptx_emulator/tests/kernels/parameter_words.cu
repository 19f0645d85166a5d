// Structs by value, for test_parameter_words.py.
struct Members {
  float* x;
  float* y;
  bool flag;
  int number;
  float* maybe;
};
struct alignas(16) Pair {
  float* x;
  int a, b;
};
struct Pointers {
  float* x[2];
  int n;
};

__device__ __noinline__ void use(Members m, int i) {
  if (m.flag) m.x[i] = m.y[i] * m.number + m.maybe[i];
}

extern "C" {

__global__ void members(Members m) {
  if (m.flag) m.x[threadIdx.x] = m.y[threadIdx.x] * m.number + m.maybe[threadIdx.x];
}
__global__ void copied(Members m) {
  use(m, threadIdx.x);
}
__global__ void pairs(Pair p, Pair q) {
  p.x[threadIdx.x] = q.x[threadIdx.x] + q.a * p.b;
}
__global__ void scalars(float* x, int n, float* y) {
  if (threadIdx.x < n) x[threadIdx.x] = y[threadIdx.x];
}
__global__ void constant_index(Pointers p) {
  if (threadIdx.x < p.n) p.x[1][threadIdx.x] = 1;
}
__global__ void variable_index(const __grid_constant__ Pointers p, int i) {
  if (threadIdx.x < p.n) p.x[i][threadIdx.x] = 1;
}

}  // extern "C"
