#include "fastdiff/ddpm_step.cuh"

#include "launchers.h"
#include "sampler_step.cuh"

extern "C" cudaError_t fastdiff_ddpm_step(const fastdiff::SamplerStepArgs* args,
                                          cudaStream_t stream) {
  using namespace fastdiff;
  return cuda::dispatch_step(*args, stream, [](auto x, auto output, auto tiled, auto vector) {
    using X = typename decltype(x)::type;
    using Output = typename decltype(output)::type;
    return ddpm_step_fwd_kernel<X, Output, decltype(tiled)::value, decltype(vector)::value>;
  });
}
