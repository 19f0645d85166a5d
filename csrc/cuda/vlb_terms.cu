#include "fastdiff/vlb_terms.cuh"

#include "dispatch.cuh"
#include "launchers.h"

namespace fastdiff::cuda {
namespace {

int vector_elements(const VlbTermsArgs& args) {
  const int V = static_cast<int>(16 / size_of(args.output_type));
  const auto fits = [V](const void* pointer, DType type) {
    return vector_aligned(pointer, type, V);
  };
  const bool vectors = args.layout.numel % V == 0 && fits(args.x0, args.noise_type) &&
                       fits(args.x_t, args.noise_type) && fits(args.noise, args.noise_type) &&
                       fits(args.model_output, args.output_type) &&
                       fits(args.grad_output, args.output_type) &&
                       (args.mode == NoiseMode::kGiven || vectors_of_noise(args.layout)) &&
                       vectors_of_heads(args.layout, args.output_strided(), V);
  return vectors ? V : 1;
}

int head_bytes(const VlbTermsArgs& args) {
  return staged_head_bytes(args.layout, args.output_strided(), 1, args.output_type);
}

ChunkPlan forward_plan(const VlbTermsArgs& args) {
  return plan_reduction(args.layout, vector_elements(args), args.mode == NoiseMode::kGenerated,
                        head_bytes(args));
}

struct Forward {
  template <typename Data, typename Output>
  static cudaError_t launch(const VlbTermsArgs& args, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(Output);
    const ChunkPlan plan = forward_plan(args);
    const auto kernel = plan.head_bytes > 0         ? vlb_terms_fwd_kernel<Data, Output, true, V>
                        : vector_elements(args) > 1 ? vlb_terms_fwd_kernel<Data, Output, false, V>
                                                    : vlb_terms_fwd_kernel<Data, Output, false, 1>;
    if (plan.per_sample > 0) {
      if (!plan.fits(args.layout)) return cudaErrorInvalidConfiguration;
      const cudaError_t error = launch_kernel(kernel, plan.blocks(args.layout), kElementwiseThreads,
                                              plan.shared_bytes(), stream, args, plan);
      if (error != cudaSuccess) return error;
    }
    const int64_t sums = 3 * args.layout.batch;
    const double scale = 1.0 / static_cast<double>(args.layout.numel);
    return finish_sums(args.out, args.partials, nullptr, sums, plan.per_sample, scale, false,
                       stream);
  }
};

struct Backward {
  template <typename Data, typename Output>
  static cudaError_t launch(const VlbTermsArgs& args, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(Output);
    const int vector = vector_elements(args);
    const ChunkPlan plan =
        plan_chunks(args.layout, vector, args.mode == NoiseMode::kGenerated, head_bytes(args));
    if (!plan.fits(args.layout)) return cudaErrorInvalidConfiguration;
    const auto kernel = plan.head_bytes > 0 ? vlb_terms_bwd_kernel<Data, Output, true, V>
                        : vector > 1        ? vlb_terms_bwd_kernel<Data, Output, false, V>
                                            : vlb_terms_bwd_kernel<Data, Output, false, 1>;
    return launch_kernel(kernel, plan.blocks(args.layout), kElementwiseThreads, plan.shared_bytes(),
                         stream, args, plan);
  }
};

// x0, x_t and noise are float32 or of the output's type.
template <typename Pass>
cudaError_t dispatch(const VlbTermsArgs& args, cudaStream_t stream) {
  return dispatch_float(args.output_type, [&](auto output) {
    using Output = typename decltype(output)::type;
    if (args.noise_type == DType::kFloat32) {
      return Pass::template launch<float, Output>(args, stream);
    }
    if (args.noise_type != args.output_type) return cudaErrorInvalidValue;
    return Pass::template launch<Output, Output>(args, stream);
  });
}

}  // namespace
}  // namespace fastdiff::cuda

extern "C" int64_t fastdiff_vlb_terms_partials(const fastdiff::VlbTermsArgs* args) {
  return 3 * args->layout.batch * fastdiff::cuda::forward_plan(*args).per_sample;
}

extern "C" cudaError_t fastdiff_vlb_terms(const fastdiff::VlbTermsArgs* args, cudaStream_t stream) {
  return fastdiff::cuda::dispatch<fastdiff::cuda::Forward>(*args, stream);
}

extern "C" cudaError_t fastdiff_vlb_terms_backward(const fastdiff::VlbTermsArgs* args,
                                                   cudaStream_t stream) {
  return fastdiff::cuda::dispatch<fastdiff::cuda::Backward>(*args, stream);
}
