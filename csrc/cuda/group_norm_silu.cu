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
    DeviceLimits limits{};
    if (const cudaError_t error = device_limits(limits); error != cudaSuccess) return error;
    vector = vector_elements(args.layout, args.x_type, {args.x, args.y});
    plan = plan_group_norm(args.layout, vector, size_of(args.x_type), kGroupNormForward, limits);
    return cudaSuccess;
  }

  int64_t workspace() const {
    const int64_t channels = args.layout.batch * args.layout.channels;
    return plan.one_pass ? 0 : channels * plan.chunks * Moments::kFloats;
  }

  template <typename T, bool ChannelsLast, int V>
  cudaError_t run(cudaStream_t stream) const {
    const int64_t blocks = args.layout.batch * plan.blocks_per_sample;
    if (plan.one_pass) {
      return launch<GroupNormSiluArgs>(group_norm_silu_fwd_kernel<T, ChannelsLast, V>, args, plan,
                                       blocks, plan.threads, plan.shared_bytes, plan.cluster,
                                       stream);
    }
    cudaError_t error = launch<GroupNormSiluArgs>(
        group_norm_silu_moments_kernel<T, ChannelsLast, V>, args, plan, blocks, plan.threads,
        plan.chunk_partials() * Moments::kFloats * sizeof(float), 1, stream);
    if (error != cudaSuccess) return error;
    error = launch<GroupNormSiluArgs>(group_norm_silu_statistics_kernel<T>, args, plan,
                                      args.layout.batch * args.layout.groups, plan.threads, 0, 1,
                                      stream);
    if (error != cudaSuccess) return error;
    return launch<GroupNormSiluArgs>(group_norm_silu_apply_kernel<T, ChannelsLast, V>, args, plan,
                                     blocks, plan.threads, plan.chunk_channels() * sizeof(float2),
                                     1, stream);
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
  return fastdiff::cuda::dispatch_group_norm(
      args->x_type, pass.args.layout.channels_last, pass.vector,
      [&](auto element, auto last, auto vector) {
        return pass.run<typename decltype(element)::type, last.value, vector.value>(stream);
      });
}
