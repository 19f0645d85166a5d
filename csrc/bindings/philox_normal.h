#pragma once

#include "fastdiff/philox_normal.h"

#include "tensors.h"

namespace fastdiff::bindings {

// Fills `out` in place.
template <typename Device>
void philox_normal(const Tensor& out, const std::optional<Tensor>& keys,
                   std::optional<int64_t> seed, int64_t stream) {
  const typename Device::Guard guard(out);
  constexpr const char* op = "philox_normal";
  STD_TORCH_CHECK(out.dim() >= 1, op, ": out must have shape (B, ...)");
  STD_TORCH_CHECK(keys.has_value() != seed.has_value(), op, ": pass either keys or seed");
  const std::optional<Tensor> keys_ready = checked_keys(keys, out, op);
  const bool channels_last = is_channels_last(out);
  STD_TORCH_CHECK(is_dense(out, channels_last), op, ": out must be contiguous or channels_last");
  PhiloxNormalArgs args{};
  args.dtype = dtype_of(out.scalar_type(), op, "out");
  STD_TORCH_CHECK(args.dtype != DType::kFloat64 && args.dtype != DType::kUInt8, op,
                  ": out must be float32, bfloat16 or float16");
  if (out.numel() == 0) return;
  args.out = out.mutable_data_ptr();
  args.noise = noise_source(keys_ready, seed, stream);
  args.layout = sample_layout(out, channels_last);
  Device::philox_normal(out, args);
}

}  // namespace fastdiff::bindings
