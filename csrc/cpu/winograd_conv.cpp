#include "winograd_conv.h"

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "winograd_conv_loops.h"

namespace fastdiff::cpu {
namespace {

// Transformed inputs of one piece of work, which are read once for every block of output channels:
// half of an L2 cache of 2 MiB.
constexpr int64_t kInputFloats = 1 << 18;
// Multiplications below which another thread does not pay.
constexpr int64_t kProductsPerThread = 1 << 20;

// Memory of a thread that grows to the largest size seen, on a cache line. One per kUse.
template <int kUse>
float* thread_memory(int64_t floats) {
  thread_local std::vector<float> memory;
  constexpr int64_t kLine = 16;
  if (static_cast<int64_t>(memory.size()) < floats + kLine) memory.resize(floats + kLine);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64 / sizeof(float);
}

// 12 accumulators, two columns and a row of 16 registers, of SSE or NEON.
typedef float Portable __attribute__((vector_size(16)));

WinogradLoops loops() {
#if FASTDIFF_HAS_CLONES
  if (isa() == Isa::kAvx512) return winograd_loops_avx512();
  if (isa() == Isa::kAvx2) return winograd_loops_avx2();
#endif
  return Winograd<Portable, 6>::loops();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void winograd_conv(const WinogradConvArgs& args) {
  const WinogradLoops run = loops();
  const int64_t points = winograd_points(args.upsample);
  const int64_t tiles = args.batch * (args.height / 2) * (args.width / 2);
  const int64_t blocks = ceil_div(args.out_channels, kWinogradBlock);
  const std::vector<float> zeros(args.channels);
  const int64_t work = points * tiles * args.channels * args.out_channels;
  const int64_t threads = std::max<int64_t>(1, std::min(num_threads(), work / kProductsPerThread));

  // Tiles per piece: as many as the cache holds, and about the same in all. The weights are read
  // once for every piece.
  const int64_t most = std::max(2 * run.panel_rows, kInputFloats / (points * args.channels));
  int64_t pieces = ceil_div(tiles, most);
  const bool shared = tiles < threads * 2 * run.panel_rows;
  if (!shared) pieces = ceil_div(pieces, threads) * threads;
  const auto piece = [&](int64_t index) { return tiles * index / pieces; };

  if (!shared) {
    // Each thread takes whole pieces: it waits for no other before the end.
    parallel_for(0, pieces, threads > 1 ? 1 : pieces, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = piece(i), rows = piece(i + 1) - first;
        const WinogradLayout layout{rows, args.channels, points};
        float* inputs = thread_memory<0>(layout.input_floats());
        float* products = thread_memory<1>(layout.product_floats());
        run.transform(args, layout, first, first, first + rows, zeros.data(), inputs);
        for (int64_t block = 0; block < blocks; ++block) {
          run.multiply(args, layout, first, block, inputs, products);
        }
      }
    });
    return;
  }
  // Few tiles: threads share the transformed inputs, and each reads a part of the weights.
  const WinogradLayout layout{tiles, args.channels, points};
  float* inputs = thread_memory<0>(layout.input_floats());
  const int64_t grain = ceil_div(tiles, threads);
  parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    run.transform(args, layout, 0, begin, end, zeros.data(), inputs);
  });
  parallel_for(0, blocks, threads > 1 ? 1 : blocks, [&](int64_t begin, int64_t end) {
    float* products = thread_memory<1>(layout.product_floats());
    for (int64_t block = begin; block < end; ++block) {
      run.multiply(args, layout, 0, block, inputs, products);
    }
  });
}

}  // namespace fastdiff::cpu
