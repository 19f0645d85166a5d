#include "elementwise.h"
#include "kernels.h"

namespace fastdiff::cpu {

void philox_normal(const PhiloxNormalArgs& args) {
  const SampleLayout& layout = args.layout;
  const bool stream = layout.batch * layout.numel * size_of(args.dtype) > kStreamBytes;
  for_each_tile(layout, 4096, [&](int64_t sample, int64_t first, int64_t n) {
    float* scratch = thread_scratch(normal_scratch(layout));
    const float* normals =
        normal_tile(layout, args.noise.key(sample), args.noise.stream, first, n, scratch);
    store_tile(args.dtype, args.out, sample * layout.numel + first, n, normals, stream);
  });
}

}  // namespace fastdiff::cpu
