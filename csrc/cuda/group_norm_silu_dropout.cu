#include "fastdiff/group_norm_silu_forward.cuh"

#include "group_norm_silu_kernels.cuh"

namespace fastdiff::cuda {

cudaError_t use_dropout(ForwardKernels& kernels, const KernelTypes& types) {
  return types.dispatch([&]<typename T, bool ChannelsLast, int V>() {
    kernels.one_pass = group_norm_silu_dropout_fwd_kernel<T, ChannelsLast, V>;
    kernels.apply = group_norm_silu_dropout_apply_kernel<T, ChannelsLast, V>;
    return cudaSuccess;
  });
}

}  // namespace fastdiff::cuda
