#pragma once

#include "fastdiff/philox_normal.h"
#include "fastdiff/q_sample.h"

namespace fastdiff::cpu {

void philox_normal(const PhiloxNormalArgs& args);
void q_sample(const QSampleArgs& args);

}  // namespace fastdiff::cpu
