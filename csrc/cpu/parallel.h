#pragma once

#include <cstdint>

namespace fastdiff::cpu {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Torch's intra-op threads. Defined by the bindings, like the next one.
int64_t num_threads();

// Runs `function` over [begin, end) on torch's intra-op threads. Defined by the bindings, so that
// the kernels need no torch header.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                     void* context);

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  if (end - begin <= grain) {
    if (begin < end) body(begin, end);
    return;
  }
  parallel_ranges(
      begin, end, grain,
      [](int64_t b, int64_t e, void* context) { (*static_cast<const F*>(context))(b, e); },
      const_cast<F*>(&body));
}

}  // namespace fastdiff::cpu
