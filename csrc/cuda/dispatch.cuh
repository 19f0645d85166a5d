#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "fastdiff/launch.cuh"
#include "fastdiff/layout.h"

namespace fastdiff::cuda {

template <typename T>
struct type_is {
  using type = T;
};

// Calls body(type_is<T>{}) with the element type of a result: float32, float16 or bfloat16.
template <typename F>
cudaError_t dispatch_float(DType dtype, const F& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(type_is<float>{});
    case DType::kFloat16:
      return body(type_is<__half>{});
    case DType::kBFloat16:
      return body(type_is<__nv_bfloat16>{});
    default:
      return cudaErrorInvalidValue;
  }
}

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether vectors of V elements of this size can be read and written at `pointer`.
inline bool vector_aligned(const void* pointer, DType dtype, int vector) {
  const int64_t bytes = vector * size_of(dtype);
  return aligned(pointer, bytes < 16 ? bytes : 16);
}

}  // namespace fastdiff::cuda
