#pragma once

// What the op bindings share: argument checks and memory layouts, on LibTorch's stable ABI.
//
// The public Python functions check their arguments with fuller messages; these checks keep the raw
// operators memory-safe.

#include <optional>
#include <vector>

#include "fastdiff/layout.h"
#include "fastdiff/philox.h"

#include "memory.h"

namespace fastdiff::bindings {

inline DType dtype_of(ScalarType type, const char* op, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " has a dtype that no kernel takes");
  }
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Double;
}

inline void check_float(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(is_float(x.scalar_type()), op, ": ", name, " must be floating point");
}

inline void check_vector(const Tensor& x, int64_t length, ScalarType type, const Tensor& like,
                         const char* op, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type, op, ": ", name, " has the wrong dtype");
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == length, op, ": ", name, " must have shape (", length,
                  ",)");
  STD_TORCH_CHECK(x.device() == like.device(), op, ": ", name, " is on another device");
}

inline void check_same_shape(const Tensor& x, const Tensor& like, const char* op,
                             const char* name) {
  bool same = x.dim() == like.dim() && x.device() == like.device();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == like.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape and device of the main input");
}

// Calls visit(d, stride) for the dimensions of a dense tensor, fastest first.
template <typename Sizes, typename Visit>
void for_dense_strides(const Sizes& sizes, bool channels_last, const Visit& visit) {
  const int64_t dim = static_cast<int64_t>(sizes.size());
  int64_t stride = 1;
  const auto take = [&](int64_t d) {
    visit(d, stride);
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) take(1);
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (!(channels_last && d == 1)) take(d);
  }
}

inline bool is_dense(const Tensor& x, bool channels_last) {
  const auto sizes = x.sizes(), strides = x.strides();
  bool dense = true;
  for_dense_strides(sizes, channels_last, [&](int64_t d, int64_t stride) {
    dense &= sizes[d] <= 1 || strides[d] == stride;
  });
  return dense || x.numel() == 0;
}

// The same rule as fastdiff/reference/layout.py: 4-D and 5-D tensors with innermost channels are
// channels_last, everything else is contiguous.
inline bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous() || (x.dim() != 4 && x.dim() != 5)) return false;
  return is_dense(x, true) || (x.stride(1) == 1 && x.size(1) > 1);
}

// A dense tensor of other sizes on the device of `like`.
template <typename Sizes>
Tensor empty_of(const Sizes& sizes, const Tensor& like, ScalarType type,
                bool channels_last = false) {
  std::vector<int64_t> strides(sizes.size());
  for_dense_strides(sizes, channels_last, [&](int64_t d, int64_t s) { strides[d] = s; });
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  return with_memory(numel, type, like, [&] {
    AtenTensorHandle handle;
    check(aoti_torch_empty_strided(
              static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
              torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
              torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.device().type())),
              like.get_device_index(), &handle),
          "an allocation");
    return Tensor(handle);
  });
}

inline Tensor empty_of(std::initializer_list<int64_t> sizes, const Tensor& like, ScalarType type) {
  return empty_of(std::vector<int64_t>(sizes), like, type);
}

inline Tensor empty(const Tensor& like, ScalarType type, bool channels_last) {
  return empty_of(like.sizes(), like, type, channels_last);
}

// A dense copy. Its memory is asked for here, for the error where there is none: see memory.h.
inline Tensor copied(const Tensor& x, ScalarType type, bool channels_last) {
  Tensor out = empty(x, type, channels_last);
  torch::stable::copy_(out, x);
  return out;
}

// `x` itself if it is dense in the format, else a copy that is.
inline Tensor in_format(const Tensor& x, bool channels_last) {
  return is_dense(x, channels_last) ? x : copied(x, x.scalar_type(), channels_last);
}

// `x` in another dtype.
inline Tensor converted(const Tensor& x, ScalarType type) {
  return copied(x, type, is_channels_last(x));
}

// Floats for a kernel to keep partial results in; no tensor for none.
inline std::optional<Tensor> workspace_of(int64_t floats, const Tensor& like) {
  if (floats == 0) return std::nullopt;
  return empty_of({floats}, like, ScalarType::Float);
}

inline SampleLayout sample_layout(const Tensor& x, bool channels_last) {
  SampleLayout layout{x.size(0), 1, channels_last ? x.size(1) : 1, 1};
  for (int64_t d = 1; d < x.dim(); ++d) layout.numel *= x.size(d);
  if (x.dim() > 1) layout.width = x.size(x.dim() - 1);
  return layout;
}

// `keys` must outlive the launch; the caller keeps it contiguous.
inline NoiseSource noise_source(const std::optional<Tensor>& keys, std::optional<int64_t> seed,
                                int64_t stream) {
  return {keys ? keys->const_data_ptr<int64_t>() : nullptr, static_cast<uint64_t>(seed.value_or(0)),
          static_cast<uint64_t>(stream)};
}

// Fills what the argument structs of all ops with noise share. The tensors must outlive the launch.
template <typename Args>
void set_noise(Args& args, const std::optional<Tensor>& noise, const std::optional<Tensor>& keys,
               std::optional<int64_t> seed, int64_t stream, const char* op) {
  args.noise = noise ? noise->const_data_ptr() : nullptr;
  args.noise_type = noise ? dtype_of(noise->scalar_type(), op, "noise") : DType::kFloat32;
  args.source = noise_source(keys, seed, stream);
  args.mode = noise ? NoiseMode::kGiven : (keys || seed) ? NoiseMode::kGenerated : NoiseMode::kNone;
}

inline std::optional<Tensor> checked_keys(const std::optional<Tensor>& keys, const Tensor& like,
                                          const char* op) {
  if (!keys) return std::nullopt;
  check_vector(*keys, like.size(0), ScalarType::Long, like, op, "keys");
  return in_format(*keys, false);
}

}  // namespace fastdiff::bindings
