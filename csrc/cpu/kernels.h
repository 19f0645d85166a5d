#pragma once

#include "fastdiff/eps_loss.h"
#include "fastdiff/group_norm_silu.h"
#include "fastdiff/philox_normal.h"
#include "fastdiff/q_sample.h"
#include "fastdiff/sampler_step.h"
#include "fastdiff/vlb_terms.h"
#include "fastdiff/winograd_conv.h"

namespace fastdiff::cpu {

void eps_loss(const EpsLossArgs& args);
void eps_loss_backward(const EpsLossArgs& args);
void group_norm_silu(const GroupNormSiluArgs& args);
void group_norm_silu_backward(const GroupNormSiluBackwardArgs& args);
void philox_normal(const PhiloxNormalArgs& args);
void q_sample(const QSampleArgs& args);
void sampler_step(const SamplerStepArgs& args);
void vlb_terms(const VlbTermsArgs& args);
void vlb_terms_backward(const VlbTermsArgs& args);
void winograd_conv(const WinogradConvArgs& args);

}  // namespace fastdiff::cpu
