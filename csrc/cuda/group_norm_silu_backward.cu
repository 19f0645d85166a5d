#include "fastdiff/group_norm_silu_backward.cuh"
#include "fastdiff/group_norm_silu_parameters.cuh"

#include "group_norm_silu_launch.cuh"
#include "launchers.h"

namespace fastdiff::cuda {
namespace {

struct Backward {
  GroupNormSiluBackwardArgs args;
  int vector = 1;
  GroupNormPlan plan{};

  explicit Backward(const GroupNormSiluBackwardArgs& given) : args(given) {
    args.layout = canonical(args.layout);
  }

  cudaError_t choose() {
    const DType type = args.x_type;
    vector = vector_elements(args.layout, type, {args.x, args.grad, args.grad_x});
    return choose_plan(
        plan, args.layout, vector, type, kGroupNormBackward, [&](const auto& wanted) {
          const cudaError_t error = dispatch([&]<typename T, bool ChannelsLast, int V>() {
            return cluster_fits<GroupNormSiluBackwardArgs>(
                       group_norm_silu_bwd_kernel<T, ChannelsLast, V>, wanted)
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

  // Whether gradients are to be added up over blocks.
  bool has_parameters() const {
    return args.layout.batch > plan.samples && (args.grad_weight.data || args.grad_bias.data);
  }

  int64_t workspace() const {
    const GroupNormLayout& layout = args.layout;
    const int64_t parameters = GradientWorkspace::parameters_floats(layout, plan);
    if (plan.one_pass) return has_parameters() ? parameters : 0;
    return parameters + GradientWorkspace::means_floats(layout) +
           layout.batch * layout.channels * plan.chunks * GradientSums::kFloats;
  }

  template <typename T, bool ChannelsLast, int V>
  cudaError_t run(cudaStream_t stream) const {
    const GroupNormLayout& layout = args.layout;
    const dim3 threads(plan.threads, plan.samples);
    const auto start = [&](GroupNormKernel<GroupNormSiluBackwardArgs> kernel, int64_t shared_bytes,
                           int cluster = 1) {
      return launch(kernel, args, plan, layout.batch / plan.samples, plan.blocks_per_sample,
                    threads, shared_bytes, cluster, stream);
    };
    const auto start_small = [&](GroupNormKernel<GroupNormSiluBackwardArgs> kernel, int64_t blocks,
                                 int of_block) {
      return launch(kernel, args, plan, blocks, 1, of_block, 0, 1, stream);
    };
    cudaError_t error = cudaSuccess;
    if (plan.one_pass) {
      error = start(group_norm_silu_bwd_kernel<T, ChannelsLast, V>,
                    plan.samples * plan.shared_bytes, plan.cluster);
    } else {
      const int64_t maps = GradientTable::kCoefficients * sizeof(float) * plan.padded_channels;
      error = start(group_norm_silu_bwd_sums_kernel<T, ChannelsLast, V>,
                    maps + plan.chunk_partials() * sizeof(GradientSums));
      if (error == cudaSuccess) {
        error = start_small(group_norm_silu_bwd_means_kernel<T>, layout.batch * layout.groups,
                            plan.threads);
      }
      if (error == cudaSuccess && args.grad_x) {
        error = start(group_norm_silu_bwd_apply_kernel<T, ChannelsLast, V>,
                      maps + plan.padded_channels * (sizeof(GroupStatistics) + sizeof(float2)));
      }
    }
    if (error != cudaSuccess || !has_parameters()) return error;
    return start_small(group_norm_silu_bwd_parameters_kernel<T>, (layout.channels + 31) / 32,
                       kParameterThreads);
  }
};

}  // namespace
}  // namespace fastdiff::cuda

extern "C" int64_t fastdiff_group_norm_silu_backward_workspace(
    const fastdiff::GroupNormSiluBackwardArgs* args) {
  fastdiff::cuda::Backward pass(*args);
  return pass.choose() == cudaSuccess ? pass.workspace() : 0;
}

extern "C" cudaError_t fastdiff_group_norm_silu_backward(
    const fastdiff::GroupNormSiluBackwardArgs* args, cudaStream_t stream) {
  fastdiff::cuda::Backward pass(*args);
  if (const cudaError_t error = pass.choose(); error != cudaSuccess) return error;
  return pass.dispatch(
      [&]<typename T, bool ChannelsLast, int V>() { return pass.run<T, ChannelsLast, V>(stream); });
}
