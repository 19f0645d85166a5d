#pragma once

#include "fastdiff/layout.h"
#include "fastdiff/philox.h"

namespace fastdiff {

struct PhiloxNormalArgs {
  void* out;
  DType dtype;
  NoiseSource noise;
  SampleLayout layout;
};

}  // namespace fastdiff
