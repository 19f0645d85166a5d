#pragma once

#include <cuda_runtime_api.h>

#include "fastdiff/philox_normal.h"
#include "fastdiff/q_sample.h"

// C linkage, so that the tests can call them through ctypes. Tensors are not empty.
extern "C" {
cudaError_t fastdiff_philox_normal(const fastdiff::PhiloxNormalArgs* args, cudaStream_t stream);
cudaError_t fastdiff_q_sample(const fastdiff::QSampleArgs* args, cudaStream_t stream);
}
