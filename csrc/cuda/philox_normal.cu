#include "fastdiff/philox_normal.cuh"

#include "dispatch.cuh"
#include "launchers.h"

extern "C" cudaError_t fastdiff_philox_normal(const fastdiff::PhiloxNormalArgs* args,
                                              cudaStream_t stream) {
  using namespace fastdiff;
  return cuda::dispatch_float(args->dtype, [&](auto out) {
    using Out = typename decltype(out)::type;
    constexpr int V = 16 / sizeof(Out);
    const bool vectors = args->layout.numel % V == 0 && vectors_of_noise(args->layout) &&
                         cuda::vector_aligned(args->out, args->dtype, V);
    const ChunkPlan plan = plan_chunks(args->layout, vectors ? V : 1, true);
    if (!plan.fits(args->layout)) return cudaErrorInvalidConfiguration;
    const auto kernel = vectors ? philox_normal_kernel<Out, V> : philox_normal_kernel<Out, 1>;
    return launch_kernel(kernel, plan.blocks(args->layout), kElementwiseThreads,
                         plan.shared_bytes(), stream, *args, plan);
  });
}
