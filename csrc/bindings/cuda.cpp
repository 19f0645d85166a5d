// Registers the CUDA kernels with torch's dispatcher. The schemas are defined in fastdiff/ops.

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launchers.h"
#include "eps_loss.h"
#include "group_norm_silu.h"
#include "philox_normal.h"
#include "q_sample.h"
#include "sampler_step.h"
#include "vlb_terms.h"

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

Tensor eps_loss_cuda(const Tensor& prediction, const std::optional<Tensor>& noise,
                    const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
                    const std::optional<Tensor>& weight, int64_t reduction, int64_t kind) {
  const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
  return eps_loss(prediction, noise, keys, seed, stream, weight, reduction, kind,
                  [](const EpsLossArgs& args) { return fastdiff_eps_loss_partials(&args); },
                  [&](const EpsLossArgs& args) {
                    launch_on(prediction, "eps_loss", fastdiff_eps_loss, args);
                  });
}

std::tuple<Tensor, Tensor> eps_loss_backward_cuda(
    const Tensor& grad, const Tensor& prediction, const std::optional<Tensor>& noise,
    const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
    const std::optional<Tensor>& weight, int64_t reduction, int64_t kind, bool need_prediction,
    bool need_noise) {
  const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
  return eps_loss_backward(grad, prediction, noise, keys, seed, stream, weight, reduction, kind,
                           need_prediction, need_noise, [&](const EpsLossArgs& args) {
                             launch_on(prediction, "eps_loss", fastdiff_eps_loss_backward, args);
                           });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cuda(
    const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& channel_bias,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t activation) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return group_norm_silu(
      x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation,
      [](const GroupNormSiluArgs& args) { return fastdiff_group_norm_silu_workspace(&args); },
      [&](const GroupNormSiluArgs& args) {
        launch_on(x, "group_norm_silu", fastdiff_group_norm_silu, args);
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    int64_t num_groups, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& channel_bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t activation, bool need_x, bool need_weight,
    bool need_bias, bool need_channel_bias, bool need_scale, bool need_shift) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return group_norm_silu_backward(
      grad, x, mean, rstd, num_groups, weight, bias, channel_bias, scale, shift, activation, need_x,
      need_weight, need_bias, need_channel_bias, need_scale, need_shift,
      [](const GroupNormSiluBackwardArgs& args) {
        return fastdiff_group_norm_silu_backward_workspace(&args);
      },
      [&](const GroupNormSiluBackwardArgs& args) {
        launch_on(x, "group_norm_silu", fastdiff_group_norm_silu_backward, args);
      });
}

std::tuple<Tensor, Tensor> ddim_step_cuda(
    const Tensor& x_t, const Tensor& model_output, const Tensor& step,
    const Tensor& table, int64_t prediction, bool clip, bool use_clipped_model_output,
    const std::optional<Tensor>& uncond, double guidance_scale, const std::optional<Tensor>& noise,
    const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
    bool return_pred_x0) {
  const torch::stable::accelerator::DeviceGuard guard(x_t.get_device_index());
  return sampler_step(false, x_t, model_output, step, table, prediction, clip, use_clipped_model_output, uncond,
                      guidance_scale, noise, keys, seed, stream, return_pred_x0,
                      [&](const char* op, const SamplerStepArgs& args) {
                        launch_on(x_t, op, fastdiff_ddim_step, args);
                      });
}

std::tuple<Tensor, Tensor> ddpm_step_cuda(
    const Tensor& x_t, const Tensor& model_output, const Tensor& step,
    const Tensor& table, int64_t prediction, bool clip, bool learned_range,
    const std::optional<Tensor>& uncond, double guidance_scale, const std::optional<Tensor>& noise,
    const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
    bool return_pred_x0) {
  const torch::stable::accelerator::DeviceGuard guard(x_t.get_device_index());
  return sampler_step(true, x_t, model_output, step, table, prediction, clip, learned_range, uncond,
                      guidance_scale, noise, keys, seed, stream, return_pred_x0,
                      [&](const char* op, const SamplerStepArgs& args) {
                        launch_on(x_t, op, fastdiff_ddpm_step, args);
                      });
}

Tensor vlb_terms_cuda(const Tensor& x0, const Tensor& x_t, const Tensor& model_output, const Tensor& t,
    const Tensor& table, const std::optional<Tensor>& noise, const std::optional<Tensor>& keys,
    std::optional<int64_t> seed, int64_t stream, int64_t prediction, bool learned, bool clip,
    bool detach_mean) {
  const torch::stable::accelerator::DeviceGuard guard(x_t.get_device_index());
  return vlb_terms({x0, x_t, model_output, t, table, noise, keys, seed, stream, prediction, learned, clip,
                    detach_mean},
                   [](const VlbTermsArgs& args) { return fastdiff_vlb_terms_partials(&args); },
                   [&](const VlbTermsArgs& args) {
                     launch_on(x_t, "vlb_terms", fastdiff_vlb_terms, args);
                   });
}

Tensor vlb_terms_backward_cuda(
    const Tensor& grad, const Tensor& x0, const Tensor& x_t, const Tensor& model_output, const Tensor& t,
    const Tensor& table, const std::optional<Tensor>& noise, const std::optional<Tensor>& keys,
    std::optional<int64_t> seed, int64_t stream, int64_t prediction, bool learned, bool clip,
    bool detach_mean) {
  const torch::stable::accelerator::DeviceGuard guard(x_t.get_device_index());
  return vlb_terms_backward(grad, {x0, x_t, model_output, t, table, noise, keys, seed, stream, prediction, learned, clip,
                    detach_mean},
                            [&](const VlbTermsArgs& args) {
                              launch_on(x_t, "vlb_terms", fastdiff_vlb_terms_backward, args);
                            });
}

}  // namespace
}  // namespace fastdiff::bindings

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("ddim_step", TORCH_BOX(&fastdiff::bindings::ddim_step_cuda));
  m.impl("ddpm_step", TORCH_BOX(&fastdiff::bindings::ddpm_step_cuda));
  m.impl("eps_loss", TORCH_BOX(&fastdiff::bindings::eps_loss_cuda));
  m.impl("eps_loss_backward", TORCH_BOX(&fastdiff::bindings::eps_loss_backward_cuda));
  m.impl("group_norm_silu", TORCH_BOX(&fastdiff::bindings::group_norm_silu_cuda));
  m.impl("group_norm_silu_backward",
         TORCH_BOX(&fastdiff::bindings::group_norm_silu_backward_cuda));
  m.impl("philox_normal_", TORCH_BOX(&fastdiff::bindings::philox_normal_cuda));
  m.impl("q_sample", TORCH_BOX(&fastdiff::bindings::q_sample_cuda));
  m.impl("vlb_terms", TORCH_BOX(&fastdiff::bindings::vlb_terms_cuda));
  m.impl("vlb_terms_backward", TORCH_BOX(&fastdiff::bindings::vlb_terms_backward_cuda));
}
