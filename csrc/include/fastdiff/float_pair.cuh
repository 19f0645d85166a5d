#pragma once

// Arithmetic on a float, or on two at once. From sm_100 on two are one instruction.

namespace fastdiff {

__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float multiply(float a, float b) { return a * b; }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

#if __CUDA_ARCH__ >= 1000
namespace float_pair {

__device__ __forceinline__ unsigned long long pack(float2 a) {
  unsigned long long packed;
  asm("mov.b64 %0, {%1, %2};" : "=l"(packed) : "f"(a.x), "f"(a.y));
  return packed;
}
__device__ __forceinline__ float2 unpack(unsigned long long packed) {
  float2 a;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(a.x), "=f"(a.y) : "l"(packed));
  return a;
}

}  // namespace float_pair

__device__ __forceinline__ float2 add(float2 a, float2 b) {
  using namespace float_pair;
  unsigned long long sum;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(sum) : "l"(pack(a)), "l"(pack(b)));
  return unpack(sum);
}
__device__ __forceinline__ float2 multiply(float2 a, float2 b) {
  using namespace float_pair;
  unsigned long long product;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(product) : "l"(pack(a)), "l"(pack(b)));
  return unpack(product);
}
__device__ __forceinline__ float2 multiply_add(float2 a, float2 b, float2 c) {
  using namespace float_pair;
  unsigned long long sum;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(sum) : "l"(pack(a)), "l"(pack(b)), "l"(pack(c)));
  return unpack(sum);
}
#else
__device__ __forceinline__ float2 add(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float2 multiply(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
__device__ __forceinline__ float2 multiply_add(float2 a, float2 b, float2 c) {
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
}
#endif

__device__ __forceinline__ float negative(float a) { return -a; }
__device__ __forceinline__ float2 negative(float2 a) { return {-a.x, -a.y}; }
__device__ __forceinline__ float first_of(float a) { return a; }
__device__ __forceinline__ float first_of(float2 a) { return a.x; }
__device__ __forceinline__ float total(float a) { return a; }
__device__ __forceinline__ float total(float2 a) { return a.x + a.y; }

// A or a pair of a.
template <typename A>
__device__ __forceinline__ A broadcast(float a);
template <>
__device__ __forceinline__ float broadcast<float>(float a) {
  return a;
}
template <>
__device__ __forceinline__ float2 broadcast<float2>(float a) {
  return {a, a};
}

// 2^a and 1 / a within 2 and 1 units in the last place; subnormal results and arguments are 0,
// which saves the scaling around the instruction that takes care of them.
__device__ __forceinline__ float fast_exp2(float a) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(a));
  return power;
}
__device__ __forceinline__ float2 fast_exp2(float2 a) { return {fast_exp2(a.x), fast_exp2(a.y)}; }
__device__ __forceinline__ float fast_reciprocal(float a) {
  float quotient;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(a));
  return quotient;
}
__device__ __forceinline__ float2 fast_reciprocal(float2 a) {
  return {fast_reciprocal(a.x), fast_reciprocal(a.y)};
}

}  // namespace fastdiff
