#pragma once

// The loops of group_norm_silu over elements, per dtype of x and compiled for several instruction
// sets; group_norm_silu.cpp and group_norm_silu_backward.cpp walk tensors with them.

#include <algorithm>

#include "dropout.h"
#include "elementwise.h"
#include "fastdiff/group_norm_silu.h"
#include "parallel.h"
#include "simd.h"
#include "tile.h"

namespace fastdiff::cpu {

// Elements per piece of work: sums over one are taken in F, sums of pieces in double.
constexpr int64_t kPiece = 4096;

// F is float, or double for float64 tensors. "Rows" are runs of one channel: `rows` of them, of `n`
// adjacent elements each, with one coefficient per row. "Pixels" are runs of all channels, with one
// coefficient per channel. With h = x + channel_bias, `k` is such that d = x - k = h - center: sums
// are taken of d, which is small where means are large, and results are made of d, which is 0 in
// constant groups.
template <typename F>
struct GroupNormKernels {
  // Per row (first array index) or channel: sum of d, sum of d^2. Rows begin `stride` elements
  // apart.
  void (*row_sums)(const void* x, int64_t rows, int64_t n, int64_t stride, const F* k, F* sum,
                   F* square);
  void (*pixel_sums)(const void* x, int64_t pixels, int64_t channels, const F* k, F* sum,
                     F* square);
  // y = act(slope d + offset), times `gain` if it is not null: dropout's multipliers.
  void (*row_apply)(const void* x, void* y, int64_t rows, int64_t n, const F* k, const F* slope,
                    const F* offset, const F* gain, bool stream);
  void (*pixel_apply)(const void* x, void* y, int64_t pixels, int64_t channels, const F* k,
                      const F* slope, const F* offset, const F* gain, bool stream);
  // z = slope d + offset, dz = grad act'(z) gain: sums of dz, dz d and d. Keeps dz in `kept` if not
  // null. The sums s2 of rows are left out if it is null.
  void (*row_grad_sums)(const void* x, const void* grad, int64_t rows, int64_t n, const F* k,
                        const F* slope, const F* offset, const F* gain, F* kept, F* s0, F* s1,
                        F* s2);
  void (*pixel_grad_sums)(const void* x, const void* grad, int64_t pixels, int64_t channels,
                          const F* k, const F* slope, const F* offset, const F* gain, F* kept,
                          F* s0, F* s1, F* s2);
  // grad_x = a dz + b d + c; dz from `kept` if not null. With `total`, grad_sum (or nothing, if it
  // is null) is added, and the sums of the unrounded results go there, per row or channel.
  void (*row_grad_x)(const void* x, const void* grad, const F* kept, void* grad_x, int64_t rows,
                     int64_t n, const F* k, const F* slope, const F* offset, const F* gain,
                     const F* a, const F* b, const F* c, const void* grad_sum, F* total,
                     bool stream);
  void (*pixel_grad_x)(const void* x, const void* grad, const F* kept, void* grad_x, int64_t pixels,
                       int64_t channels, const F* k, const F* slope, const F* offset, const F* gain,
                       const F* a, const F* b, const F* c, const void* grad_sum, F* total,
                       bool stream);
  // sum = (x + residual) + bias, per row or channel.
  void (*row_add)(const void* x, const void* residual, void* sum, int64_t rows, int64_t n,
                  const F* bias);
  void (*pixel_add)(const void* x, const void* residual, void* sum, int64_t pixels,
                    int64_t channels, const F* bias);
  // Whether the loops that write tensors do so past the caches if `stream`; others ignore it.
  bool streams;
  // Whether the rows' elements of `gain` are those with even numbers first, in runs of 16.
  bool evens_first;
};

template <typename F>
GroupNormKernels<F> group_norm_kernels(DType x_type, Activation activation);

// Those for CPUs with AVX-512 and its bfloat16 instructions. Defined where FASTDIFF_HAS_CLONES.
GroupNormKernels<float> group_norm_kernels_avx512(DType x_type, Activation activation);

// How the elements of a tensor are cut into pieces, depending on nothing but the shape, so that
// sums do not depend on batch or threads. A sample's pieces are numbered in memory order.
struct Pieces {
  int64_t per_run;  // pieces per row, or per sample if channels_last
  int64_t length;   // elements of a row, or pixels, per piece; the last one of a run is shorter
  int64_t run;      // elements of a row, or pixels of a sample

  Pieces(int64_t run_length, int64_t piece_length)
      : per_run(std::max<int64_t>(1, (run_length + piece_length - 1) / piece_length)),
        length(std::min(run_length, piece_length)),
        run(run_length) {}

  int64_t begin(int64_t piece) const { return piece % per_run * length; }
  int64_t size(int64_t piece) const { return std::min(length, run - begin(piece)); }
};

// Pixels of a piece of a channels_last sample: a multiple of 4.
inline int64_t piece_pixels(int64_t channels) {
  return std::max<int64_t>(4, 4 * kPiece / channels / 4 * 4);
}

// Work below which another thread does not pay, in elements.
constexpr int64_t kElementsPerThread = 8192;

// Runs body(begin, end) over `items` of `elements` each.
template <typename Body>
void parallel_items(int64_t items, int64_t elements, const Body& body) {
  parallel_for(0, items, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements)),
               body);
}

// Whether each of `units` independent units (groups, or channels_last samples) is one thread's
// work; otherwise all threads share a unit.
inline bool one_thread_each(int64_t units, int64_t elements) {
  const int64_t threads = num_threads();
  return units >= 8 * threads || threads == 1 || units * elements <= 2 * kElementsPerThread ||
         (units >= threads && units % threads == 0);
}

// Groups that are computed together: as many as have kPiece elements.
inline int64_t groups_per_block(const GroupNormLayout& layout) {
  return std::clamp<int64_t>(kPiece / layout.group_numel(), 1, layout.groups);
}

// Calls body(first unit, count) for the groups [begin, end) of (B, G) in blocks of neighbours
// within a sample. What small groups have to wait for (a sum, a square root) then overlaps, and
// their rows are one run.
template <typename Body>
void for_each_block(const GroupNormLayout& layout, int64_t begin, int64_t end, const Body& body) {
  const int64_t size = groups_per_block(layout);
  for (int64_t unit = begin; unit < end;) {
    const int64_t left = layout.groups - unit % layout.groups;
    const int64_t count = std::min({size, left, end - unit});
    body(unit, count);
    unit += count;
  }
}

// Whether a result is written past the caches: when they do not hold it together with what it is
// made of, `size` bytes per element in all.
inline bool is_streamed(const GroupNormLayout& layout, int64_t size) {
  return layout.batch * layout.channels * layout.pixels * size >= 2 * kStreamBytes;
}

// Calls write(to, first, n, stream) for parts [first, first + n) of `count` parts of `length`
// elements of `size` bytes each. `to` is their place in `out`, to be written past the caches if
// `stream`: reading the lines of a result that is about to be overwritten costs a third of the
// traffic. Loops that cannot (`streams` is false) write runs of kPiece elements into a tile in the
// L1 cache, which is copied past the caches; that is slower, as the copy waits for no memory and
// the loop only for it.
template <typename Write>
void write_parts(char* out, int64_t count, int64_t length, int64_t size, bool stream, bool streams,
                 const Write& write) {
  if (!stream || streams || length > kPiece) return write(out, int64_t{0}, count, stream);
  alignas(64) char tile[kPiece * sizeof(double)];
  const int64_t step = kPiece / length;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t n = std::min(step, count - first);
    write(tile, first, n, false);
    stream_bytes(out + first * length * size, tile, n * length * size);
  }
}

// n values of a small operand from index `first` on, as F; `memory` has n elements.
template <typename F>
const F* read_channels(const ChannelVector& vector, int64_t first, int64_t n, F neutral,
                       F* memory) {
  if (!vector.data) {
    std::fill(memory, memory + n, neutral);
    return memory;
  }
  if constexpr (sizeof(F) == 8) {
    return static_cast<const double*>(vector.data) + first;
  } else {
    return load_tile(vector.type, vector.data, first, n, memory);
  }
}

// The small operands of channels [first, first + n) of a sample, as F; absent ones are neutral.
template <typename F>
struct Operands {
  const F *weight, *bias, *channel_bias, *scale, *shift;

  static constexpr int64_t kCount = 5;

  // `memory` has kCount * n elements.
  template <typename Args>
  Operands(const Args& args, int64_t sample, int64_t first, int64_t n, F* memory)
      : weight(read(args.weight, sample, first, n, F(1), memory)),
        bias(read(args.bias, sample, first, n, F(0), memory + n)),
        channel_bias(read(args.channel_bias, sample, first, n, F(0), memory + 2 * n)),
        scale(read(args.scale, sample, first, n, F(0), memory + 3 * n)),
        shift(read(args.shift, sample, first, n, F(0), memory + 4 * n)) {}

 private:
  static const F* read(const ChannelVector& vector, int64_t sample, int64_t first, int64_t n,
                       F neutral, F* memory) {
    return read_channels(vector, sample * vector.row_stride + first, n, neutral, memory);
  }
};

// A group's base from its mean, which was rounded once, with the bias `added` of the first channel
// in it: backward passes, which are given no more. Any value that rounds to the mean may be the
// base; where the group's `first` element does, it is the one that is exact in constant groups.
template <typename T>
T base_of(T mean, T added, T first) {
  return first + added == mean ? first : mean - added;
}

// The coefficients of z = slope (x - k) + offset for the channels of some groups, from the groups'
// bases (fastdiff/group_norm_silu.h).
template <typename F>
FASTDIFF_HD void affines_loop(const Operands<F>& operands, int64_t groups, int64_t depth,
                              const F* bases, const F* rstds, F* k, F* slope, F* offset) {
  for (int64_t g = 0; g < groups; ++g) {
    const F base = bases[g], rstd = rstds[g], first = operands.channel_bias[g * depth];
#pragma omp simd
    for (int64_t c = g * depth; c < (g + 1) * depth; ++c) {
      const ChannelAffine<F> affine = channel_affine(rstd, operands.weight[c], operands.bias[c],
                                                     operands.scale[c], operands.shift[c]);
      k[c] = base - (operands.channel_bias[c] - first);
      slope[c] = affine.slope;
      offset[c] = affine.offset;
    }
  }
}

}  // namespace fastdiff::cpu
