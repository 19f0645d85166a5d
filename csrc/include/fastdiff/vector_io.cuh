#pragma once

// Reads and writes of V consecutive elements as floats, in accesses of up to 16 bytes.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fastdiff/layout.h"
#include "fastdiff/q_sample.h"

namespace fastdiff {

template <typename T>
struct dtype_traits;
template <>
struct dtype_traits<float> {
  static constexpr DType dtype = DType::kFloat32;
};
template <>
struct dtype_traits<__half> {
  static constexpr DType dtype = DType::kFloat16;
};
template <>
struct dtype_traits<__nv_bfloat16> {
  static constexpr DType dtype = DType::kBFloat16;
};
template <>
struct dtype_traits<uint8_t> {
  static constexpr DType dtype = DType::kUInt8;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(uint8_t x) { return pixel_from_uint8(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The widest access that divides V elements of T, at most 16 bytes.
template <int Bytes>
struct Packet;
template <>
struct Packet<1> {
  using type = uint8_t;
};
template <>
struct Packet<2> {
  using type = uint16_t;
};
template <>
struct Packet<4> {
  using type = uint32_t;
};
template <>
struct Packet<8> {
  using type = uint2;
};
template <>
struct Packet<16> {
  using type = uint4;
};

template <typename T, int V>
struct Vector {
  static constexpr int kBytes = V * sizeof(T) < 16 ? V * sizeof(T) : 16;
  static constexpr int kPackets = V * sizeof(T) / kBytes;
  using Access = typename Packet<kBytes>::type;

  union {
    Access packets[kPackets];
    T values[V];
  };

  __device__ __forceinline__ Vector() {}
};

// Elements [0, V) of `in`, which is aligned to the access.
template <int V, typename T>
__device__ __forceinline__ void load_vector(const T* in, float out[V]) {
  Vector<T, V> vector;
  using Access = typename Vector<T, V>::Access;
#pragma unroll
  for (int p = 0; p < Vector<T, V>::kPackets; ++p) {
    vector.packets[p] = __ldg(reinterpret_cast<const Access*>(in) + p);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = to_float(vector.values[v]);
}

template <int V, typename T>
__device__ __forceinline__ void store_vector(T* out, const float in[V]) {
  Vector<T, V> vector;
  using Access = typename Vector<T, V>::Access;
#pragma unroll
  for (int v = 0; v < V; ++v) vector.values[v] = from_float<T>(in[v]);
#pragma unroll
  for (int p = 0; p < Vector<T, V>::kPackets; ++p) {
    // A plain assignment is one store only where the compiler leaves it whole.
    __stwb(reinterpret_cast<Access*>(out) + p, vector.packets[p]);
  }
}

}  // namespace fastdiff
