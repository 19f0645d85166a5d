// Registers the CUDA kernels with torch's dispatcher. The schemas are defined in fastdiff/ops.

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launchers.h"
#include "philox_normal.h"
#include "q_sample.h"

namespace fastdiff::bindings {
namespace {

// Runs a launcher on the tensor's device and torch's current stream there.
template <typename Launcher, typename Args>
void launch_on(const Tensor& x, const char* op, Launcher launcher, const Args& args) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const cudaError_t error = launcher(&args, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

Tensor q_sample_cuda(const Tensor& x0, const Tensor& t, const Tensor& sqrt_alpha_bar,
                     const Tensor& sqrt_one_minus_alpha_bar, const std::optional<Tensor>& noise,
                     const std::optional<Tensor>& keys, std::optional<int64_t> seed,
                     int64_t stream, const std::optional<Tensor>& flip,
                     std::optional<ScalarType> dtype) {
  const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  return q_sample(x0, t, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise, keys, seed, stream, flip,
                  dtype, [&](const QSampleArgs& args) {
                    launch_on(x0, "q_sample", fastdiff_q_sample, args);
                  });
}

void philox_normal_cuda(const Tensor& out, const std::optional<Tensor>& keys,
                        std::optional<int64_t> seed, int64_t stream) {
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  philox_normal(out, keys, seed, stream, [&](const PhiloxNormalArgs& args) {
    launch_on(out, "philox_normal", fastdiff_philox_normal, args);
  });
}

}  // namespace
}  // namespace fastdiff::bindings

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("philox_normal_", TORCH_BOX(&fastdiff::bindings::philox_normal_cuda));
  m.impl("q_sample", TORCH_BOX(&fastdiff::bindings::q_sample_cuda));
}
