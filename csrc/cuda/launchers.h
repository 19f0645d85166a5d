#pragma once

#include <cuda_runtime_api.h>

#include "fastdiff/eps_loss.h"
#include "fastdiff/group_norm_silu.h"
#include "fastdiff/philox_normal.h"
#include "fastdiff/q_sample.h"
#include "fastdiff/sampler_step.h"
#include "fastdiff/vlb_terms.h"

// C linkage, so that the tests can call them through ctypes. Results are not empty.
extern "C" {
cudaError_t fastdiff_ddim_step(const fastdiff::SamplerStepArgs* args, cudaStream_t stream);
cudaError_t fastdiff_ddpm_step(const fastdiff::SamplerStepArgs* args, cudaStream_t stream);
// Floats of workspace that fastdiff_eps_loss needs in args->partials.
int64_t fastdiff_eps_loss_partials(const fastdiff::EpsLossArgs* args);
cudaError_t fastdiff_eps_loss(const fastdiff::EpsLossArgs* args, cudaStream_t stream);
cudaError_t fastdiff_eps_loss_backward(const fastdiff::EpsLossArgs* args, cudaStream_t stream);
// Floats of workspace that the pass needs in args->workspace; 0 if none.
int64_t fastdiff_group_norm_silu_workspace(const fastdiff::GroupNormSiluArgs* args);
cudaError_t fastdiff_group_norm_silu(const fastdiff::GroupNormSiluArgs* args, cudaStream_t stream);
int64_t fastdiff_group_norm_silu_backward_workspace(
    const fastdiff::GroupNormSiluBackwardArgs* args);
cudaError_t fastdiff_group_norm_silu_backward(const fastdiff::GroupNormSiluBackwardArgs* args,
                                              cudaStream_t stream);
cudaError_t fastdiff_philox_normal(const fastdiff::PhiloxNormalArgs* args, cudaStream_t stream);
cudaError_t fastdiff_q_sample(const fastdiff::QSampleArgs* args, cudaStream_t stream);
// Floats of workspace that fastdiff_vlb_terms needs in args->partials.
int64_t fastdiff_vlb_terms_partials(const fastdiff::VlbTermsArgs* args);
cudaError_t fastdiff_vlb_terms(const fastdiff::VlbTermsArgs* args, cudaStream_t stream);
cudaError_t fastdiff_vlb_terms_backward(const fastdiff::VlbTermsArgs* args, cudaStream_t stream);
}
