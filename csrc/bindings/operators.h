#pragma once

#include "eps_loss.h"
#include "group_norm_silu.h"
#include "philox_normal.h"
#include "q_sample.h"
#include "sampler_step.h"
#include "vlb_terms.h"

namespace fastdiff::bindings {

// Registers every operator with the kernels of one device. The schemas are defined in fastdiff/ops.
//
// Device has
// - Guard, made of a tensor: while it lives, that tensor's device is the current one;
// - check_rows(rows, number, op, name), which refuses rows of a table that do not exist, if that is
//   cheap to see;
// - workspace(args): floats of workspace that the kernel for `args` needs;
// - <operator>(x, args), which runs the kernel on the device of x.
template <typename Device, typename Library>
void register_operators(Library& library) {
  library.impl("ddim_step", TORCH_BOX(&ddim_step<Device>));
  library.impl("ddpm_step", TORCH_BOX(&ddpm_step<Device>));
  library.impl("eps_loss", TORCH_BOX(&eps_loss<Device>));
  library.impl("eps_loss_backward", TORCH_BOX(&eps_loss_backward<Device>));
  library.impl("group_norm_silu", TORCH_BOX(&group_norm_silu<Device>));
  library.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward<Device>));
  library.impl("group_norm_silu_dropout", TORCH_BOX(&group_norm_silu_dropout<Device>));
  library.impl("group_norm_silu_dropout_backward",
               TORCH_BOX(&group_norm_silu_dropout_backward<Device>));
  library.impl("philox_normal_", TORCH_BOX(&philox_normal<Device>));
  library.impl("q_sample", TORCH_BOX(&q_sample<Device>));
  library.impl("residual_group_norm_silu", TORCH_BOX(&residual_group_norm_silu<Device>));
  library.impl("residual_group_norm_silu_backward",
               TORCH_BOX(&residual_group_norm_silu_backward<Device>));
  library.impl("vlb_terms", TORCH_BOX(&vlb_terms<Device>));
  library.impl("vlb_terms_backward", TORCH_BOX(&vlb_terms_backward<Device>));
}

}  // namespace fastdiff::bindings
