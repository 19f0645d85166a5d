#include "fastdiff/eps_loss.cuh"

#include <algorithm>

#include "dispatch.cuh"
#include "launchers.h"

namespace fastdiff::cuda {
namespace {

int vector_elements(const EpsLossArgs& args) {
  const int V = static_cast<int>(16 / size_of(args.prediction_type));
  const bool vectors = args.layout.numel % V == 0 &&
                       vector_aligned(args.prediction, args.prediction_type, V) &&
                       vector_aligned(args.noise, args.noise_type, V) &&
                       vector_aligned(args.grad_prediction, args.prediction_type, V) &&
                       vector_aligned(args.grad_noise, args.noise_type, V) &&
                       (args.mode == NoiseMode::kGiven || vectors_of_noise(args.layout));
  return vectors ? V : 1;
}

ChunkPlan forward_plan(const EpsLossArgs& args) {
  return plan_reduction(args.layout, vector_elements(args), args.mode == NoiseMode::kGenerated);
}

// Whether the first stage writes losses, not partial sums.
bool whole_samples(const EpsLossArgs& args, const ChunkPlan& plan) {
  return args.reduction == Reduction::kNone && plan.per_sample == 1;
}

// Samples whose sums a block adds up before it writes, if only their total is wanted. A partial sum
// is 8 bytes, written and read: twice as many samples until that is a 48th of the prediction, as
// long as the blocks fill a device, or have 4 KB each.
int samples_per_block(const EpsLossArgs& args, const ChunkPlan& plan) {
  const int64_t bytes = args.layout.numel * size_of(args.prediction_type);
  const int64_t enough = std::clamp<int64_t>(args.layout.batch * bytes / 4096, 1, kDeviceBlocks);
  int samples = 1;
  while (args.reduction != Reduction::kNone && plan.per_sample == 1 && samples < 16 &&
         samples * bytes < 8 * 48 && args.layout.batch / (2 * samples) >= enough) {
    samples *= 2;
  }
  return samples;
}

int64_t small_blocks(const EpsLossArgs& args, int samples) {
  return (args.layout.batch + samples - 1) / samples;
}

struct Forward {
  template <typename Prediction, typename Noise>
  static cudaError_t launch(const EpsLossArgs& args, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(Prediction);
    const ChunkPlan plan = forward_plan(args);
    const int samples = samples_per_block(args, plan);
    if (samples > 1) return small_samples<Prediction, Noise>(args, plan, samples, stream);
    const auto kernel = vector_elements(args) > 1 ? eps_loss_fwd_kernel<Prediction, Noise, V>
                                                  : eps_loss_fwd_kernel<Prediction, Noise, 1>;
    if (args.layout.batch * plan.per_sample > 0) {
      if (!plan.fits(args.layout)) return cudaErrorInvalidConfiguration;
      const bool whole = whole_samples(args, plan);
      const cudaError_t error =
          launch_kernel(kernel, plan.blocks(args.layout), kElementwiseThreads, plan.shared_bytes(),
                        stream, args, plan, whole, static_cast<float>(args.scale()));
      if (whole || error != cudaSuccess) return error;
    }
    return finish_sums(static_cast<float*>(args.out), static_cast<const float*>(args.partials),
                       static_cast<const float*>(args.weight), args.layout.batch, plan.per_sample,
                       args.scale(), args.reduction != Reduction::kNone, stream);
  }

  template <typename Prediction, typename Noise>
  static cudaError_t small_samples(const EpsLossArgs& args, const ChunkPlan& plan, int samples,
                                   cudaStream_t stream) {
    constexpr int V = 16 / sizeof(Prediction);
    const auto kernel = vector_elements(args) > 1 ? eps_loss_small_fwd_kernel<Prediction, Noise, V>
                                                  : eps_loss_small_fwd_kernel<Prediction, Noise, 1>;
    const int64_t blocks = small_blocks(args, samples);
    const cudaError_t error = launch_kernel(kernel, blocks, kElementwiseThreads,
                                            plan.shared_bytes(), stream, args, plan, samples);
    if (error != cudaSuccess) return error;
    return finish_sums(static_cast<float*>(args.out), static_cast<const float*>(args.partials),
                       nullptr, 1, blocks, args.scale(), true, stream);
  }
};

struct Backward {
  template <typename Prediction, typename Noise>
  static cudaError_t launch(const EpsLossArgs& args, cudaStream_t stream) {
    constexpr int V = 16 / sizeof(Prediction);
    const int vector = vector_elements(args);
    const ChunkPlan plan = plan_chunks(args.layout, vector, args.mode == NoiseMode::kGenerated);
    if (!plan.fits(args.layout)) return cudaErrorInvalidConfiguration;
    const auto kernel = vector > 1 ? eps_loss_bwd_kernel<Prediction, Noise, V>
                                   : eps_loss_bwd_kernel<Prediction, Noise, 1>;
    return launch_kernel(kernel, plan.blocks(args.layout), kElementwiseThreads, plan.shared_bytes(),
                         stream, args, plan, static_cast<float>(args.scale()));
  }
};

template <typename Pass>
cudaError_t dispatch(const EpsLossArgs& args, cudaStream_t stream) {
  return dispatch_float(args.prediction_type, [&](auto prediction) {
    using Prediction = typename decltype(prediction)::type;
    if (args.mode == NoiseMode::kGenerated || args.noise_type == DType::kFloat32) {
      return Pass::template launch<Prediction, float>(args, stream);
    }
    if (args.noise_type != args.prediction_type) return cudaErrorInvalidValue;
    return Pass::template launch<Prediction, Prediction>(args, stream);
  });
}

}  // namespace
}  // namespace fastdiff::cuda

extern "C" int64_t fastdiff_eps_loss_partials(const fastdiff::EpsLossArgs* args) {
  const fastdiff::ChunkPlan plan = fastdiff::cuda::forward_plan(*args);
  if (fastdiff::cuda::whole_samples(*args, plan)) return 0;
  const int samples = fastdiff::cuda::samples_per_block(*args, plan);
  return samples > 1 ? fastdiff::cuda::small_blocks(*args, samples)
                     : args->layout.batch * plan.per_sample;
}

extern "C" cudaError_t fastdiff_eps_loss(const fastdiff::EpsLossArgs* args, cudaStream_t stream) {
  return fastdiff::cuda::dispatch<fastdiff::cuda::Forward>(*args, stream);
}

extern "C" cudaError_t fastdiff_eps_loss_backward(const fastdiff::EpsLossArgs* args,
                                                  cudaStream_t stream) {
  return fastdiff::cuda::dispatch<fastdiff::cuda::Backward>(*args, stream);
}
