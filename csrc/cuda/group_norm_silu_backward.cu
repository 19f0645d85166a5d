#include "fastdiff/group_norm_silu_backward.cuh"
#include "fastdiff/group_norm_silu_parameters.cuh"

#include "group_norm_silu_kernels.cuh"
#include "launchers.h"

namespace fastdiff::cuda {
namespace {

struct Backward {
  GroupNormSiluBackwardArgs args;
  BackwardKernels kernels{};
  GroupNormPlan plan{};

  explicit Backward(const GroupNormSiluBackwardArgs& given) : args(given) {
    args.layout = canonical(args.layout);
  }

  // Whether x is a sum whose own gradient comes in.
  bool residual() const { return args.grad_sum || args.grad_sum_bias.data; }

  cudaError_t choose() {
    const GroupNormLayout& layout = args.layout;
    const int vector =
        vector_elements(layout, args.x_type, {args.x, args.grad, args.grad_sum, args.grad_x});
    const KernelTypes types = {args.x_type, layout.channels_last, vector};
    cudaError_t error = types.dispatch([&]<typename T, bool ChannelsLast, int V>() {
      kernels = {group_norm_silu_bwd_kernel<T, ChannelsLast, V>,
                 group_norm_silu_bwd_sums_kernel<T, ChannelsLast, V>,
                 group_norm_silu_bwd_means_kernel<T>,
                 group_norm_silu_bwd_apply_kernel<T, ChannelsLast, V>,
                 group_norm_silu_bwd_parameters_kernel<T>};
      return cudaSuccess;
    });
    if (error == cudaSuccess && args.dropout.threshold) error = use_dropout(kernels, types);
    if (error == cudaSuccess && residual()) error = use_residual(kernels, types);
    if (error != cudaSuccess) return error;
    return choose_plan(plan, layout, vector, args.x_type,
                       residual() ? kGroupNormSumBackward : kGroupNormBackward,
                       [&](const auto& wanted) { return cluster_fits(kernels.one_pass, wanted); });
  }

  // Whether gradients are to be added up over blocks: of weight and bias, and of a sum's bias.
  bool has_parameters() const {
    return args.layout.batch > plan.samples && (args.grad_weight.data || args.grad_bias.data);
  }
  bool has_sums() const {
    const bool alone = GradientWorkspace(nullptr, args.layout, plan).sum_rows == 1;
    return args.grad_sum_bias.data && !(plan.one_pass && alone);
  }

  int64_t workspace() const {
    const GroupNormLayout& layout = args.layout;
    const int64_t parameters = GradientWorkspace::parameters_floats(layout, plan);
    if (!plan.one_pass) {
      return parameters + GradientWorkspace::means_floats(layout) +
             layout.batch * layout.channels * plan.chunks * GradientSums::kFloats;
    }
    const int64_t rows = GradientWorkspace(nullptr, layout, plan).sum_rows;
    if (has_sums()) return parameters + rows * layout.channels;
    return has_parameters() ? parameters : 0;
  }

  cudaError_t run(cudaStream_t stream) const {
    const GroupNormLayout& layout = args.layout;
    const dim3 threads(plan.threads, plan.samples);
    const auto start = [&](BackwardKernels::Kernel kernel, int64_t shared_bytes, int cluster = 1) {
      return launch(kernel, args, plan, layout.batch / plan.samples, plan.blocks_per_sample,
                    threads, shared_bytes, cluster, stream);
    };
    const auto start_small = [&](BackwardKernels::Kernel kernel, int64_t blocks, int of_block) {
      return launch(kernel, args, plan, blocks, 1, of_block, 0, 1, stream);
    };
    cudaError_t error = cudaSuccess;
    if (plan.one_pass) {
      error = start(kernels.one_pass, plan.samples * plan.shared_bytes, plan.cluster);
    } else {
      const int64_t maps = GradientTable::kCoefficients * sizeof(float) * plan.padded_channels;
      error = start(kernels.sums, maps + plan.chunk_partials() * sizeof(GradientSums));
      if (error == cudaSuccess) {
        error = start_small(kernels.means, layout.batch * layout.groups, plan.threads);
      }
      if (error == cudaSuccess && args.grad_x) {
        const int64_t groups = plan.padded_channels * (sizeof(GroupStatistics) + sizeof(float2));
        const int64_t sums = residual() ? plan.chunk_partials() * sizeof(ChannelSum) : 0;
        error = start(kernels.apply, maps + groups + sums);
      }
    }
    if (error != cudaSuccess || !(has_parameters() || has_sums())) return error;
    const int64_t blocks = (layout.channels + 31) / 32;
    return start_small(kernels.parameters, has_sums() ? 2 * blocks : blocks, kParameterThreads);
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
  return pass.run(stream);
}
