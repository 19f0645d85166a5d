#include "fastdiff/group_norm_silu_parameters.cuh"

#include "group_norm_silu_kernels.cuh"

namespace fastdiff::cuda {

cudaError_t use_residual(BackwardKernels& kernels, const KernelTypes& types) {
  return types.dispatch([&]<typename T, bool ChannelsLast, int V>() {
    kernels.one_pass = group_norm_silu_residual_bwd_kernel<T, ChannelsLast, V>;
    kernels.apply = group_norm_silu_residual_bwd_apply_kernel<T, ChannelsLast, V>;
    kernels.parameters = group_norm_silu_residual_bwd_parameters_kernel<T>;
    return cudaSuccess;
  });
}

}  // namespace fastdiff::cuda
