#pragma once

// What the launchers of ddim_step and ddpm_step share.

#include <type_traits>

#include "dispatch.cuh"
#include "fastdiff/sampler_step.cuh"

namespace fastdiff::cuda {

template <int V>
using vector_of = std::integral_constant<int, V>;

template <typename X, typename Output, typename Kernel>
cudaError_t launch_step(const SamplerStepArgs& args, cudaStream_t stream, const Kernel& kernel_of) {
  constexpr int V = 16 / sizeof(X);
  const bool generated = args.mode == NoiseMode::kGenerated;
  const int head_bytes =
      staged_head_bytes(args.layout, args.output_strided(), args.uncond ? 2 : 1, args.output_type);
  const auto fits = [](const void* pointer, DType type) {
    return vector_aligned(pointer, type, V);
  };
  const auto head_fits = [&](const void* pointer) {  // staging copies 16 bytes at a time
    return head_bytes > 0 ? aligned(pointer, 16) : fits(pointer, args.output_type);
  };
  const bool vectors = args.layout.numel % V == 0 && fits(args.x_s, args.x_type) &&
                       fits(args.pred_x0, args.x_type) && fits(args.x_t, args.x_type) &&
                       fits(args.noise, args.x_type) && head_fits(args.model_output) &&
                       head_fits(args.uncond) && (!generated || vectors_of_noise(args.layout)) &&
                       vectors_of_heads(args.layout, args.output_strided(), V);
  const ChunkPlan plan = plan_chunks(args.layout, vectors ? V : 1, generated, head_bytes);
  if (!plan.fits(args.layout)) return cudaErrorInvalidConfiguration;
  const auto with = [&](auto tiled, auto vector) {
    return kernel_of(type_is<X>{}, type_is<Output>{}, tiled, vector);
  };
  const auto kernel = plan.head_bytes > 0 ? with(std::true_type{}, vector_of<V>{})
                      : vectors           ? with(std::false_type{}, vector_of<V>{})
                                          : with(std::false_type{}, vector_of<1>{});
  return launch_kernel(kernel, plan.blocks(args.layout), kElementwiseThreads, plan.shared_bytes(),
                       stream, args, plan);
}

// kernel_of(type_is<X>{}, type_is<Output>{}, tiled, vector_of<V>{}) is the op's kernel. A float32
// state goes with model outputs of any type, a half-precision one with its own type and float32.
template <typename Kernel>
cudaError_t dispatch_step(const SamplerStepArgs& args, cudaStream_t stream,
                          const Kernel& kernel_of) {
  return dispatch_float(args.x_type, [&](auto x) {
    using X = typename decltype(x)::type;
    if constexpr (std::is_same_v<X, float>) {
      return dispatch_float(args.output_type, [&](auto output) {
        return launch_step<X, typename decltype(output)::type>(args, stream, kernel_of);
      });
    } else {
      if (args.output_type == DType::kFloat32) {
        return launch_step<X, float>(args, stream, kernel_of);
      }
      if (args.output_type != args.x_type) return cudaErrorInvalidValue;
      return launch_step<X, X>(args, stream, kernel_of);
    }
  });
}

}  // namespace fastdiff::cuda
