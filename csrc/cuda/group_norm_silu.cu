#include "fastdiff/group_norm_silu_forward.cuh"

#include "group_norm_silu_kernels.cuh"
#include "launchers.h"

namespace fastdiff::cuda {
namespace {

struct Forward {
  GroupNormSiluArgs args;
  ForwardKernels kernels{};
  GroupNormPlan plan{};

  explicit Forward(const GroupNormSiluArgs& given) : args(given) {
    args.layout = canonical(args.layout);
  }

  cudaError_t choose() {
    const GroupNormLayout& layout = args.layout;
    const int vector =
        vector_elements(layout, args.x_type, {args.x, args.residual, args.sum, args.y});
    const KernelTypes types = {args.x_type, layout.channels_last, vector};
    cudaError_t error = types.dispatch([&]<typename T, bool ChannelsLast, int V>() {
      kernels = {group_norm_silu_fwd_kernel<T, ChannelsLast, V>,
                 group_norm_silu_moments_kernel<T, ChannelsLast, V>,
                 group_norm_silu_statistics_kernel<T>,
                 group_norm_silu_apply_kernel<T, ChannelsLast, V>};
      return cudaSuccess;
    });
    if (error == cudaSuccess && args.dropout.threshold) error = use_dropout(kernels, types);
    if (error == cudaSuccess && args.residual) error = use_residual(kernels, types);
    if (error != cudaSuccess) return error;
    return choose_plan(plan, layout, vector, args.x_type, kGroupNormForward,
                       [&](const auto& wanted) { return cluster_fits(kernels.one_pass, wanted); });
  }

  int64_t workspace() const {
    const int64_t channels = args.layout.batch * args.layout.channels;
    return plan.one_pass ? 0 : channels * plan.chunks * Moments::kFloats;
  }

  cudaError_t run(cudaStream_t stream) {
    const GroupNormLayout& layout = args.layout;
    const auto start = [&](ForwardKernels::Kernel kernel, int64_t shared_bytes, int cluster = 1) {
      return launch(kernel, args, plan, layout.batch, plan.blocks_per_sample, plan.threads,
                    shared_bytes, cluster, stream);
    };
    if (plan.one_pass) return start(kernels.one_pass, plan.shared_bytes, plan.cluster);
    const int64_t biases = args.residual ? plan.padded_channels : 0;
    const int64_t moments = plan.chunk_partials() * Moments::kFloats;
    cudaError_t error = start(kernels.moments, (biases + moments) * sizeof(float));
    if (error != cudaSuccess) return error;
    if (args.residual) args.x = args.sum;  // as the moments kernel wrote it
    error = launch(kernels.statistics, args, plan, layout.batch * layout.groups, 1, plan.threads, 0,
                   1, stream);
    if (error != cudaSuccess) return error;
    return start(kernels.apply, AffineTable::kCoefficients * sizeof(float) * plan.padded_channels);
  }
};

}  // namespace
}  // namespace fastdiff::cuda

extern "C" int64_t fastdiff_group_norm_silu_workspace(const fastdiff::GroupNormSiluArgs* args) {
  fastdiff::cuda::Forward pass(*args);
  return pass.choose() == cudaSuccess ? pass.workspace() : 0;
}

extern "C" cudaError_t fastdiff_group_norm_silu(const fastdiff::GroupNormSiluArgs* args,
                                                cudaStream_t stream) {
  fastdiff::cuda::Forward pass(*args);
  if (const cudaError_t error = pass.choose(); error != cudaSuccess) return error;
  return pass.run(stream);
}
