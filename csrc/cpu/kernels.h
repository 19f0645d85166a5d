#pragma once

#include "fastdiff/eps_loss.h"
#include "fastdiff/group_norm_silu.h"
#include "fastdiff/philox_normal.h"
#include "fastdiff/q_sample.h"

namespace fastdiff::cpu {

void eps_loss(const EpsLossArgs& args);
void eps_loss_backward(const EpsLossArgs& args);
void group_norm_silu(const GroupNormSiluArgs& args);
void group_norm_silu_backward(const GroupNormSiluBackwardArgs& args);
void philox_normal(const PhiloxNormalArgs& args);
void q_sample(const QSampleArgs& args);

}  // namespace fastdiff::cpu
