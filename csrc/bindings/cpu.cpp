// Registers the CPU kernels with torch's dispatcher.

#include "../cpu/kernels.h"
#include "../cpu/parallel.h"
#include "operators.h"
#include "winograd_conv.h"

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

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  template <typename Args>
  static int64_t workspace(const Args&) {
    return 0;
  }

  static void check_rows(const Tensor& rows, int64_t number, const char* op, const char* name) {
    const int64_t* row = rows.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < rows.numel(); ++k) {
      STD_TORCH_CHECK(row[k] >= 0 && row[k] < number, op, ": ", name, "[", k, "] = ", row[k],
                      ", expected 0 <= ", name, " < ", number);
    }
  }

  static void q_sample(const Tensor&, const QSampleArgs& args) { cpu::q_sample(args); }
  static void philox_normal(const Tensor&, const PhiloxNormalArgs& args) {
    cpu::philox_normal(args);
  }
  static void eps_loss(const Tensor&, const EpsLossArgs& args) { cpu::eps_loss(args); }
  static void eps_loss_backward(const Tensor&, const EpsLossArgs& args) {
    cpu::eps_loss_backward(args);
  }
  static void ddim_step(const Tensor&, const SamplerStepArgs& args) { cpu::sampler_step(args); }
  static void ddpm_step(const Tensor&, const SamplerStepArgs& args) { cpu::sampler_step(args); }
  static void group_norm_silu(const Tensor&, const GroupNormSiluArgs& args) {
    cpu::group_norm_silu(args);
  }
  static void group_norm_silu_backward(const Tensor&, const GroupNormSiluBackwardArgs& args) {
    cpu::group_norm_silu_backward(args);
  }
  static void vlb_terms(const Tensor&, const VlbTermsArgs& args) { cpu::vlb_terms(args); }
  static void vlb_terms_backward(const Tensor&, const VlbTermsArgs& args) {
    cpu::vlb_terms_backward(args);
  }
  static void winograd_conv(const Tensor&, const WinogradConvArgs& args) {
    cpu::winograd_conv(args);
  }
};

}  // namespace
}  // namespace bindings
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  using namespace fastdiff::bindings;
  register_operators<Cpu>(m);
  m.impl("eps_loss_with_gradient", TORCH_BOX(&eps_loss_with_gradient<Cpu>));
  m.impl("winograd_conv", TORCH_BOX(&winograd_conv<Cpu>));
}
