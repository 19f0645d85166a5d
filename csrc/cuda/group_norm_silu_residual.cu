#include "fastdiff/group_norm_silu_forward.cuh"

#include "group_norm_silu_kernels.cuh"

namespace fastdiff::cuda {

cudaError_t use_residual(ForwardKernels& kernels, const KernelTypes& types) {
  return types.dispatch([&]<typename T, bool ChannelsLast, int V>() {
    kernels.one_pass = group_norm_silu_residual_fwd_kernel<T, ChannelsLast, V>;
    kernels.moments = group_norm_silu_residual_moments_kernel<T, ChannelsLast, V>;
    return cudaSuccess;
  });
}

}  // namespace fastdiff::cuda
