// Registers the CUDA kernels with torch's dispatcher.

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launchers.h"
#include "operators.h"

namespace fastdiff::bindings {
namespace {

// Runs a launcher on the tensor's device and torch's current stream there.
template <typename Launcher, typename Args>
void launch_on(const Tensor& x, const char* op, Launcher launcher, const Args& args) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream), "the current stream");
  const cudaError_t error = launcher(&args, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, once: who looks next would take it for their own
  STD_TORCH_CHECK(false, op, ": CUDA error: ", cudaGetErrorString(error));
}

struct Cuda {
  struct Guard : torch::stable::accelerator::DeviceGuard {
    explicit Guard(const Tensor& x) : DeviceGuard(x.get_device_index()) {}
  };

  // Kernels give samples of a row that does not exist NaN: to look here would wait for the device.
  static void check_rows(const Tensor&, int64_t, const char*, const char*) {}

  static int64_t workspace(const EpsLossArgs& args) { return fastdiff_eps_loss_partials(&args); }
  static int64_t workspace(const VlbTermsArgs& args) { return fastdiff_vlb_terms_partials(&args); }
  static int64_t workspace(const GroupNormSiluArgs& args) {
    return fastdiff_group_norm_silu_workspace(&args);
  }
  static int64_t workspace(const GroupNormSiluBackwardArgs& args) {
    return fastdiff_group_norm_silu_backward_workspace(&args);
  }

  static void q_sample(const Tensor& x, const QSampleArgs& args) {
    launch_on(x, "q_sample", fastdiff_q_sample, args);
  }
  static void philox_normal(const Tensor& x, const PhiloxNormalArgs& args) {
    launch_on(x, "philox_normal", fastdiff_philox_normal, args);
  }
  static void eps_loss(const Tensor& x, const EpsLossArgs& args) {
    launch_on(x, "eps_loss", fastdiff_eps_loss, args);
  }
  static void eps_loss_backward(const Tensor& x, const EpsLossArgs& args) {
    launch_on(x, "eps_loss", fastdiff_eps_loss_backward, args);
  }
  static void ddim_step(const Tensor& x, const SamplerStepArgs& args) {
    launch_on(x, "ddim_step", fastdiff_ddim_step, args);
  }
  static void ddpm_step(const Tensor& x, const SamplerStepArgs& args) {
    launch_on(x, "ddpm_step", fastdiff_ddpm_step, args);
  }
  static void group_norm_silu(const Tensor& x, const GroupNormSiluArgs& args) {
    launch_on(x, "group_norm_silu", fastdiff_group_norm_silu, args);
  }
  static void group_norm_silu_backward(const Tensor& x, const GroupNormSiluBackwardArgs& args) {
    launch_on(x, "group_norm_silu", fastdiff_group_norm_silu_backward, args);
  }
  static void vlb_terms(const Tensor& x, const VlbTermsArgs& args) {
    launch_on(x, "vlb_terms", fastdiff_vlb_terms, args);
  }
  static void vlb_terms_backward(const Tensor& x, const VlbTermsArgs& args) {
    launch_on(x, "vlb_terms", fastdiff_vlb_terms_backward, args);
  }
};

}  // namespace
}  // namespace fastdiff::bindings

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  fastdiff::bindings::register_operators<fastdiff::bindings::Cuda>(m);
}
