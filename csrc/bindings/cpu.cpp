// Registers the CPU kernels with torch's dispatcher. The schemas are defined in fastdiff/ops.

#include "../cpu/kernels.h"
#include "../cpu/parallel.h"
#include "eps_loss.h"
#include "group_norm_silu.h"
#include "philox_normal.h"
#include "q_sample.h"
#include "sampler_step.h"
#include "vlb_terms.h"

namespace fastdiff {

int64_t cpu::num_threads() {
  uint32_t threads = 1;
  bindings::check(torch_get_num_threads(&threads), "torch_get_num_threads");
  return threads;
}

void cpu::parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                          void* context) {
  bindings::check(torch_parallel_for(begin, end, grain, function, context), "torch_parallel_for");
}

namespace bindings {
namespace {

Tensor q_sample_cpu(const Tensor& x0, const Tensor& t, const Tensor& sqrt_alpha_bar,
                    const Tensor& sqrt_one_minus_alpha_bar, const std::optional<Tensor>& noise,
                    const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
                    const std::optional<Tensor>& flip, std::optional<ScalarType> dtype) {
  return q_sample(x0, t, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise, keys, seed, stream, flip,
                  dtype, [](const QSampleArgs& args) {
                    for (int64_t k = 0; k < args.layout.batch; ++k) {
                      STD_TORCH_CHECK(args.t[k] >= 0 && args.t[k] < args.num_timesteps,
                                      "q_sample: t[", k, "] = ", args.t[k], ", expected 0 <= t < ",
                                      args.num_timesteps);
                    }
                    cpu::q_sample(args);
                  });
}

void philox_normal_cpu(const Tensor& out, const std::optional<Tensor>& keys,
                       std::optional<int64_t> seed, int64_t stream) {
  philox_normal(out, keys, seed, stream, cpu::philox_normal);
}

Tensor eps_loss_cpu(const Tensor& prediction, const std::optional<Tensor>& noise,
                    const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
                    const std::optional<Tensor>& weight, int64_t reduction, int64_t kind) {
  return eps_loss(prediction, noise, keys, seed, stream, weight, reduction, kind,
                  [](const EpsLossArgs&) { return int64_t{0}; }, cpu::eps_loss);
}

std::tuple<Tensor, Tensor> eps_loss_with_gradient_cpu(
    const Tensor& prediction, const std::optional<Tensor>& noise, const std::optional<Tensor>& keys,
    std::optional<int64_t> seed, int64_t stream, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t kind) {
  return eps_loss_with_gradient(prediction, noise, keys, seed, stream, weight, reduction, kind,
                                cpu::eps_loss);
}

std::tuple<Tensor, Tensor> eps_loss_backward_cpu(
    const Tensor& grad, const Tensor& prediction, const std::optional<Tensor>& noise,
    const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
    const std::optional<Tensor>& weight, int64_t reduction, int64_t kind, bool need_prediction,
    bool need_noise) {
  return eps_loss_backward(grad, prediction, noise, keys, seed, stream, weight, reduction, kind,
                           need_prediction, need_noise, cpu::eps_loss_backward);
}

void checked_sampler_step(const char* op, const SamplerStepArgs& args) {
  for (int64_t k = 0; k < args.layout.batch; ++k) {
    STD_TORCH_CHECK(args.columns(k), op, ": step[", k, "] = ", args.step[k],
                    ", expected 0 <= step < ", args.num_rows);
  }
  cpu::sampler_step(args);
}

std::tuple<Tensor, Tensor> ddim_step_cpu(
    const Tensor& x_t, const Tensor& model_output, const Tensor& step,
    const Tensor& table, int64_t prediction, bool clip, bool use_clipped_model_output,
    const std::optional<Tensor>& uncond, double guidance_scale, const std::optional<Tensor>& noise,
    const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
    bool return_pred_x0) {
  return sampler_step(false, x_t, model_output, step, table, prediction, clip, use_clipped_model_output, uncond,
                      guidance_scale, noise, keys, seed, stream, return_pred_x0,
                      checked_sampler_step);
}

std::tuple<Tensor, Tensor> ddpm_step_cpu(
    const Tensor& x_t, const Tensor& model_output, const Tensor& step,
    const Tensor& table, int64_t prediction, bool clip, bool learned_range,
    const std::optional<Tensor>& uncond, double guidance_scale, const std::optional<Tensor>& noise,
    const std::optional<Tensor>& keys, std::optional<int64_t> seed, int64_t stream,
    bool return_pred_x0) {
  return sampler_step(true, x_t, model_output, step, table, prediction, clip, learned_range, uncond,
                      guidance_scale, noise, keys, seed, stream, return_pred_x0,
                      checked_sampler_step);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cpu(
    const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& channel_bias,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t activation) {
  return group_norm_silu(x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation,
                         [](const GroupNormSiluArgs&) { return int64_t{0}; },
                         cpu::group_norm_silu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    int64_t num_groups, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& channel_bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t activation, bool need_x, bool need_weight,
    bool need_bias, bool need_channel_bias, bool need_scale, bool need_shift) {
  return group_norm_silu_backward(
      grad, x, mean, rstd, num_groups, weight, bias, channel_bias, scale, shift, activation, need_x,
      need_weight, need_bias, need_channel_bias, need_scale, need_shift,
      [](const GroupNormSiluBackwardArgs&) { return int64_t{0}; }, cpu::group_norm_silu_backward);
}

void check_rows(const VlbTermsArgs& args) {
  for (int64_t k = 0; k < args.layout.batch; ++k) {
    STD_TORCH_CHECK(args.t[k] >= 0 && args.t[k] < args.num_rows, "vlb_terms: t[", k,
                    "] = ", args.t[k], ", expected 0 <= t < ", args.num_rows);
  }
}

Tensor vlb_terms_cpu(const Tensor& x0, const Tensor& x_t, const Tensor& model_output, const Tensor& t,
    const Tensor& table, const std::optional<Tensor>& noise, const std::optional<Tensor>& keys,
    std::optional<int64_t> seed, int64_t stream, int64_t prediction, bool learned, bool clip,
    bool detach_mean) {
  return vlb_terms({x0, x_t, model_output, t, table, noise, keys, seed, stream, prediction, learned, clip,
                    detach_mean},
                   [](const VlbTermsArgs&) { return int64_t{0}; },
                   [](const VlbTermsArgs& args) {
                     check_rows(args);
                     cpu::vlb_terms(args);
                   });
}

Tensor vlb_terms_backward_cpu(
    const Tensor& grad, const Tensor& x0, const Tensor& x_t, const Tensor& model_output, const Tensor& t,
    const Tensor& table, const std::optional<Tensor>& noise, const std::optional<Tensor>& keys,
    std::optional<int64_t> seed, int64_t stream, int64_t prediction, bool learned, bool clip,
    bool detach_mean) {
  return vlb_terms_backward(grad, {x0, x_t, model_output, t, table, noise, keys, seed, stream, prediction, learned, clip,
                    detach_mean},
                            [](const VlbTermsArgs& args) {
                              check_rows(args);
                              cpu::vlb_terms_backward(args);
                            });
}

}  // namespace
}  // namespace bindings
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("ddim_step", TORCH_BOX(&fastdiff::bindings::ddim_step_cpu));
  m.impl("ddpm_step", TORCH_BOX(&fastdiff::bindings::ddpm_step_cpu));
  m.impl("eps_loss", TORCH_BOX(&fastdiff::bindings::eps_loss_cpu));
  m.impl("eps_loss_with_gradient", TORCH_BOX(&fastdiff::bindings::eps_loss_with_gradient_cpu));
  m.impl("eps_loss_backward", TORCH_BOX(&fastdiff::bindings::eps_loss_backward_cpu));
  m.impl("group_norm_silu", TORCH_BOX(&fastdiff::bindings::group_norm_silu_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&fastdiff::bindings::group_norm_silu_backward_cpu));
  m.impl("philox_normal_", TORCH_BOX(&fastdiff::bindings::philox_normal_cpu));
  m.impl("q_sample", TORCH_BOX(&fastdiff::bindings::q_sample_cpu));
  m.impl("vlb_terms", TORCH_BOX(&fastdiff::bindings::vlb_terms_cpu));
  m.impl("vlb_terms_backward", TORCH_BOX(&fastdiff::bindings::vlb_terms_backward_cpu));
}
