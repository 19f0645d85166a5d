#pragma once

#include <algorithm>
#include <vector>

#include "fastdiff/layout.h"
#include "parallel.h"
#include "tile.h"

namespace fastdiff::cpu {

// Calls body(sample, first, n) for every tile of every sample, on all threads.
// `elements_per_thread` is the work below which another thread does not pay.
template <typename F>
void for_each_tile(const SampleLayout& layout, int64_t elements_per_thread, const F& body) {
  if (layout.numel == 0) return;
  const int64_t size = tile_elements(layout);
  const int64_t per_sample = (layout.numel + size - 1) / size;
  const int64_t grain = std::max<int64_t>(1, elements_per_thread / std::min(size, layout.numel));
  parallel_for(0, layout.batch * per_sample, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile % per_sample * size;
      body(tile / per_sample, first, std::min(size, layout.numel - first));
    }
    finish_streaming();
  });
}

// Per-thread memory that grows to the largest tile seen: channels_last tiles grow with the
// channels.
template <typename F = float>
F* thread_scratch(int64_t size) {
  thread_local std::vector<F> memory;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

// A tile of the noise of `args`, the argument struct of any op with noise (layout, mode, noise,
// noise_type, source): given or generated. `scratch` has normal_scratch(layout) floats.
template <typename Args>
const float* noise_tile(const Args& args, int64_t sample, int64_t first, int64_t n,
                        float* scratch) {
  if (args.mode == NoiseMode::kGenerated) {
    return normal_tile(args.layout, args.source.key(sample), args.source.stream, first, n, scratch);
  }
  return load_tile(args.noise_type, args.noise, sample * args.layout.numel + first, n, scratch);
}

}  // namespace fastdiff::cpu
