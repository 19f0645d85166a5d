#pragma once

// Elementwise kernels work on tiles that stay in the L1 cache: inputs are converted to float there,
// the formula runs over float tiles, the result is converted and written out. So a formula is
// compiled once per instruction set, not once per combination of dtypes.

#include <cstdint>

#include "fastdiff/layout.h"
#include "fastdiff/philox.h"

namespace fastdiff::cpu {

constexpr int64_t kTile = 1024;  // floats; three of them are 12 KB of a 32 KB L1 cache

// Outputs larger than this bypass the cache: reading the lines that are about to be overwritten
// costs a third of the traffic of an op with two inputs.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Elements [offset, offset + n) of `base` as floats: the array itself if it is float32, else
// converted into `buffer`. uint8 levels become pixels in [-1, 1].
const float* load_tile(DType dtype, const void* base, int64_t offset, int64_t n, float* buffer);

// Writes n floats to [offset, offset + n) of `base`, past the cache if `stream`.
void store_tile(DType dtype, void* base, int64_t offset, int64_t n, const float* tile, bool stream);

// Copies n bytes past the cache.
void stream_bytes(void* destination, const void* source, int64_t n);

// After the last streaming store of a thread.
void finish_streaming();

// Elements of one sample per tile: whole groups of pixels if channels_last, so that noise, which is
// generated along logical order, is not generated twice.
int64_t tile_elements(const SampleLayout& layout);

// Floats of scratch that normal_tile needs.
int64_t normal_scratch(const SampleLayout& layout);

// Normals of memory indices [first, first + n) of the sample with this key; `first` is a multiple
// of tile_elements. Returns a pointer into `scratch`.
const float* normal_tile(const SampleLayout& layout, uint64_t key, uint64_t stream, int64_t first,
                         int64_t n, float* scratch);

}  // namespace fastdiff::cpu
