#include "fastdiff/q_sample.cuh"

#include "dispatch.cuh"
#include "launchers.h"

namespace fastdiff::cuda {
namespace {

template <typename Out, typename X0, typename Noise>
cudaError_t launch(const QSampleArgs& args, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(Out);
  const bool generated = args.mode == NoiseMode::kGenerated;
  const bool vectors = args.layout.numel % V == 0 && vector_aligned(args.out, args.out_type, V) &&
                       vector_aligned(args.x0, args.x0_type, V) &&
                       vector_aligned(args.noise, args.noise_type, V) &&
                       (!generated || vectors_of_noise(args.layout));
  const ChunkPlan plan = plan_chunks(args.layout, vectors ? V : 1, generated);
  if (!plan.fits(args.layout)) return cudaErrorInvalidConfiguration;
  const auto kernel =
      vectors ? q_sample_fwd_kernel<Out, X0, Noise, V> : q_sample_fwd_kernel<Out, X0, Noise, 1>;
  return launch_kernel(kernel, plan.blocks(args.layout), kElementwiseThreads, plan.shared_bytes(),
                       stream, args, plan);
}

template <typename Out, typename X0>
cudaError_t dispatch_noise(const QSampleArgs& args, cudaStream_t stream) {
  if (args.mode != NoiseMode::kGiven || args.noise_type == DType::kFloat32) {
    return launch<Out, X0, float>(args, stream);
  }
  if (args.noise_type != dtype_traits<Out>::dtype) return cudaErrorInvalidValue;
  return launch<Out, X0, Out>(args, stream);
}

}  // namespace
}  // namespace fastdiff::cuda

extern "C" cudaError_t fastdiff_q_sample(const fastdiff::QSampleArgs* args, cudaStream_t stream) {
  using namespace fastdiff;
  return cuda::dispatch_float(args->out_type, [&](auto out) {
    using Out = typename decltype(out)::type;
    if (args->x0_type == DType::kUInt8) return cuda::dispatch_noise<Out, uint8_t>(*args, stream);
    if (args->x0_type == DType::kFloat32) return cuda::dispatch_noise<Out, float>(*args, stream);
    if (args->x0_type != dtype_traits<Out>::dtype) return cudaErrorInvalidValue;
    return cuda::dispatch_noise<Out, Out>(*args, stream);
  });
}
