#pragma once

// Calls of torch's C interface that can fail, and memory from torch with torch's own error where
// there is none left.

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace fastdiff::bindings {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what torch says went wrong, which a caller can ask for from torch 2.13 on.
inline void check(AOTITorchError error, const char* what) {
  if (error == TORCH_SUCCESS) return;
  using Reason = const char* (*)();
  const auto reason =
      reinterpret_cast<Reason>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* text = reason ? reason() : nullptr;
  throw std::runtime_error(std::string(what) +
                           " failed: " + (text ? text : "this torch does not say why"));
}

// c10's classes as far as an allocation needs them: they have been the same in every torch that
// these libraries run with (2.10 on).
namespace c10_abi {
struct DataPtr {
  void* data;
  std::unique_ptr<void, void (*)(void*)> owner;
  struct {
    int8_t type, index;
  } device;
};
struct Allocator {
  virtual ~Allocator() = default;
  virtual DataPtr allocate(size_t bytes) = 0;
};
}  // namespace c10_abi

// Throws torch's own exception if `bytes` cannot be had on the current device of this type, among
// them the one that is torch.OutOfMemoryError in Python. Through the C interface its type is lost,
// before torch 2.13 its words too, and callers that retry with a smaller batch look for both. So
// this is called after a failure and asks the allocator itself. Without its symbol nothing is
// thrown.
inline void demand_memory(int64_t bytes, DeviceType type) {
  using GetAllocator = c10_abi::Allocator* (*)(const DeviceType&);
  const auto allocator_of = reinterpret_cast<GetAllocator>(
      dlsym(RTLD_DEFAULT, "_ZN3c1012GetAllocatorERKNS_10DeviceTypeE"));
  if (allocator_of) allocator_of(type)->allocate(static_cast<size_t>(bytes));  // given back at once
}

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Bool:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

// make(), which makes a tensor of so many elements on the device of `like`.
template <typename Make>
Tensor with_memory(int64_t numel, ScalarType type, const Tensor& like, const Make& make) {
  try {
    return make();
  } catch (const std::runtime_error&) {
    demand_memory(numel * bytes_of(type), like.device().type());
  }
  return make();  // it was something else, or there is memory now
}

}  // namespace fastdiff::bindings
