#include "fastdiff/group_norm_silu_backward.cuh"

#include "group_norm_silu_kernels.cuh"

namespace fastdiff::cuda {

cudaError_t use_dropout(BackwardKernels& kernels, const KernelTypes& types) {
  return types.dispatch([&]<typename T, bool ChannelsLast, int V>() {
    kernels.one_pass = group_norm_silu_dropout_bwd_kernel<T, ChannelsLast, V>;
    kernels.sums = group_norm_silu_dropout_bwd_sums_kernel<T, ChannelsLast, V>;
    kernels.apply = group_norm_silu_dropout_bwd_apply_kernel<T, ChannelsLast, V>;
    return cudaSuccess;
  });
}

}  // namespace fastdiff::cuda
