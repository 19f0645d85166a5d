#include "fastdiff/group_norm_silu_forward.cuh"

#include "group_norm_silu_launch.cuh"
#include "launchers.h"

namespace fastdiff::cuda {
namespace {

struct Forward {
  GroupNormSiluArgs args;
  int vector = 1;
  GroupNormPlan plan{};

  explicit Forward(const GroupNormSiluArgs& given) : args(given) {
    args.layout = canonical(args.layout);
  }

  cudaError_t choose() {
    const DType type = args.x_type;
    vector = vector_elements(args.layout, type, {args.x, args.y});
    return choose_plan(plan, args.layout, vector, type, kGroupNormForward, [&](const auto& wanted) {
      const cudaError_t error = dispatch([&]<typename T, bool ChannelsLast, int V>() {
        return cluster_fits<GroupNormSiluArgs>(group_norm_silu_fwd_kernel<T, ChannelsLast, V>,
                                               wanted)
                   ? cudaSuccess
                   : cudaErrorInvalidClusterSize;
      });
      return error == cudaSuccess;
    });
  }

  template <typename F>
  cudaError_t dispatch(const F& body) const {
    return dispatch_group_norm(args.x_type, args.layout.channels_last, vector, body);
  }

  int64_t workspace() const {
    const int64_t channels = args.layout.batch * args.layout.channels;
    return plan.one_pass ? 0 : channels * plan.chunks * Moments::kFloats;
  }

  template <typename T, bool ChannelsLast, int V>
  cudaError_t run(cudaStream_t stream) const {
    const GroupNormLayout& layout = args.layout;
    const auto start = [&](GroupNormKernel<GroupNormSiluArgs> kernel, int64_t floats) {
      return launch(kernel, args, plan, layout.batch, plan.blocks_per_sample, plan.threads,
                    floats * sizeof(float), 1, stream);
    };
    if (plan.one_pass) {
      return launch<GroupNormSiluArgs>(group_norm_silu_fwd_kernel<T, ChannelsLast, V>, args, plan,
                                       layout.batch, plan.blocks_per_sample, plan.threads,
                                       plan.shared_bytes, plan.cluster, stream);
    }
    cudaError_t error = start(group_norm_silu_moments_kernel<T, ChannelsLast, V>,
                              plan.chunk_partials() * Moments::kFloats);
    if (error != cudaSuccess) return error;
    error = launch<GroupNormSiluArgs>(group_norm_silu_statistics_kernel<T>, args, plan,
                                      layout.batch * layout.groups, 1, plan.threads, 0, 1, stream);
    if (error != cudaSuccess) return error;
    return start(group_norm_silu_apply_kernel<T, ChannelsLast, V>,
                 AffineTable::kCoefficients * plan.padded_channels);
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
  return pass.dispatch(
      [&]<typename T, bool ChannelsLast, int V>() { return pass.run<T, ChannelsLast, V>(stream); });
}
