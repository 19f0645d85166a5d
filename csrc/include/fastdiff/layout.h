#pragma once

#include <cstdint>

#include "fastdiff/macros.h"

namespace fastdiff {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kUInt8, kFloat64 };

FASTDIFF_HD constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64   ? 8
         : dtype == DType::kFloat32 ? 4
         : dtype == DType::kUInt8   ? 1
                                    : 2;
}

// How the elements of every sample lie in memory. All tensors of a call share it.
//
// Memory index i of a sample is (row * width + w) * inner + c. In a contiguous tensor inner = 1 and
// memory order is logical order; in a channels_last one inner is the number of channels, and the
// logical index is c * pixels + (row * width + w).
struct SampleLayout {
  int64_t batch;
  int64_t numel;  // elements per sample
  int64_t inner;  // channels if channels_last, else 1
  int64_t width;  // size of the last logical dimension

  FASTDIFF_HD int64_t logical_index(int64_t i) const {
    return inner == 1 ? i : (i % inner) * (numel / inner) + i / inner;
  }

  // Memory index of the element that a horizontal flip moves to memory index i.
  FASTDIFF_HD int64_t flipped_index(int64_t i) const {
    const int64_t pixel = i / inner;
    const int64_t column = pixel % width;
    return i + (width - 1 - 2 * column) * inner;
  }
};

}  // namespace fastdiff
