#pragma once

// The kernels of group_norm_silu's passes as the launchers see them. Those with dropout and those
// of a residual sum are in files of their own, which compile side by side.

#include "group_norm_silu_launch.cuh"

namespace fastdiff::cuda {

// What kernels are compiled for.
struct KernelTypes {
  DType type;
  bool channels_last;
  int vector;  // elements per access

  // Calls body<element type, channels_last, vector>().
  template <typename F>
  cudaError_t dispatch(const F& body) const {
    return dispatch_group_norm(type, channels_last, vector, body);
  }
};

struct ForwardKernels {
  using Kernel = GroupNormKernel<GroupNormSiluArgs>;
  Kernel one_pass;
  Kernel moments, statistics, apply;  // split
};

// Replace the kernels that differ.
cudaError_t use_dropout(ForwardKernels& kernels, const KernelTypes& types);
cudaError_t use_residual(ForwardKernels& kernels, const KernelTypes& types);

struct BackwardKernels {
  using Kernel = GroupNormKernel<GroupNormSiluBackwardArgs>;
  Kernel one_pass;
  Kernel sums, means, apply;  // split
  Kernel parameters;          // sums over the batch
};

cudaError_t use_dropout(BackwardKernels& kernels, const KernelTypes& types);
cudaError_t use_residual(BackwardKernels& kernels, const KernelTypes& types);

}  // namespace fastdiff::cuda
