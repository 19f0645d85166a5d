#pragma once

// How group_norm_silu divides a tensor among blocks, and the choice between its kernels.
//
// The work is cut into items: `block_channels` adjacent channels of a sample times a run of pixels.
// In the contiguous layout an item is a part of one channel's row; in channels_last it is a strip
// of pixels, at least a 32-byte sector wide. A warp (or part of it) handles an item and leaves one
// partial sum per channel. All later sums take the items in the order of their numbers, so a result
// depends on the items, which follow from the shape of a sample, and not on the batch or on which
// block had an item.

#include <climits>

#include "fastdiff/group_norm_silu.h"

namespace fastdiff {

constexpr int kGroupNormThreads = 512;  // at most, per block of one pass
constexpr int kGroupNormSplitThreads = 256;
constexpr int64_t kSectorBytes = 32;
constexpr int kPortableCluster = 8;  // blocks that every device with clusters allows

struct DeviceLimits {
  int64_t shared_bytes;  // per block, with the opt-in
  int multiprocessors;
  int max_cluster;  // blocks per cluster: 1, kPortableCluster, or 16 with another opt-in
};

// The items of `channels` channels: blocks of block_channels, cut into segments of pixels.
struct GroupNormTiling {
  bool channels_last;
  int channels;
  int block_channels;
  int blocks;
  int segments;            // of a block
  int64_t segment_pixels;  // of all segments but a block's last
  int lanes;               // that work side by side: on pixels, in channels_last on channels

  FASTDIFF_HD int items() const { return blocks * segments; }
  FASTDIFF_HD int64_t item_numel() const { return segment_pixels * block_channels; }
  FASTDIFF_HD int64_t pixels_of(int segment, int64_t pixels) const {
    const int64_t rest = pixels - segment * segment_pixels;
    return rest < segment_pixels ? rest : segment_pixels;
  }
};

// One pass: `cluster` blocks share a unit of whole groups, which stays in their shared memory.
// Split: a block handles chunk_blocks channel blocks, or chunk_segments segments of one, and leaves
// one partial sum per channel and chunk in the workspace; further kernels add these up and apply.
struct GroupNormPlan {
  GroupNormTiling tiling;  // of a unit; of a whole sample if split
  bool one_pass;
  int cluster;
  int items_per_block;  // one pass
  int chunk_blocks;     // split
  int chunk_segments;
  int chunks;   // per channel
  int samples;  // one pass: of a block, side by side
  int threads;  // per sample of a block
  int64_t blocks_per_sample;
  // One pass, per sample of a block; of the split kernels see chunk_partials(), chunk_channels().
  int64_t shared_bytes;

  FASTDIFF_HD int chunk_channels() const { return chunk_blocks * tiling.block_channels; }
  FASTDIFF_HD int chunk_partials() const { return chunk_channels() * chunk_segments; }
};

// What differs between the passes: tensors kept on chip, floats of a partial sum, floats of
// coefficients per channel, and floats per channel that a block leaves to be added up over the
// batch.
struct GroupNormPass {
  int tensors;
  int partial;
  int coefficients;
  int row;
};
constexpr GroupNormPass kGroupNormForward = {1, 2, 2, 0};
constexpr GroupNormPass kGroupNormBackward = {2, 3, 4, 2};

namespace group_norm_plan {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// The smallest power of two that is at least n, at most 32.
constexpr int lanes_for(int64_t n) {
  int lanes = 1;
  while (lanes < n && lanes < 32) lanes *= 2;
  return lanes;
}

constexpr int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// `item_bytes` is what an item should have. Items are whole batches of four vectors per lane where
// there is enough. In channels_last they are `widest` vectors wide, or less.
inline GroupNormTiling tile(const GroupNormLayout& layout, int64_t channels, int vector,
                            int64_t element_size, int64_t item_bytes, int64_t widest = 32) {
  GroupNormTiling tiling{};
  tiling.channels_last = layout.channels_last;
  tiling.channels = static_cast<int>(channels);
  int64_t width = vector, extent = layout.pixels / vector;  // bytes of a step, steps of a block
  if (layout.channels_last) {
    // Strips of equal width and of whole sectors.
    const int64_t vectors = channels / vector, strips = ceil_div(vectors, widest);
    width = ceil_div(ceil_div(vectors, strips), 2) * 2 * vector;
    width = width < channels ? width : channels;
    extent = layout.pixels;
  }
  tiling.block_channels = static_cast<int>(layout.channels_last ? width : 1);
  tiling.blocks = static_cast<int>(ceil_div(channels, tiling.block_channels));
  const int side = lanes_for(layout.channels_last ? width / vector : extent);
  const int64_t batch = 4 * (layout.channels_last ? 32 / side : side);
  int64_t segment = clamp(ceil_div(item_bytes, width * element_size), 1, extent);
  segment = ceil_div(extent, ceil_div(extent, segment));
  if (segment > batch) segment = ceil_div(segment, batch) * batch;
  segment = segment < extent ? segment : extent;
  tiling.segments = static_cast<int>(ceil_div(extent, segment));
  tiling.segment_pixels = layout.channels_last ? segment : segment * vector;
  tiling.lanes = lanes_for(layout.channels_last ? width / vector : segment);
  return tiling;
}

// Channels that stay together on chip: one group; in channels_last as many as fill whole sectors,
// or whole vectors, or (without vectors) the lanes of a warp.
inline int64_t unit_channels(const GroupNormLayout& layout, int vector, int64_t element_size) {
  const int64_t size = layout.group_channels();
  if (!layout.channels_last) return size;
  if (vector == 1) {
    int64_t groups = 1;
    for (int64_t s = 2; s * size <= 32; ++s) groups = layout.groups % s == 0 ? s : groups;
    return groups * size;
  }
  int64_t step = kSectorBytes / element_size;
  if (layout.channels % step) step = vector;
  return size / gcd(size, step) * step;
}

inline int items_per_warp(const GroupNormTiling& tiling) {
  return tiling.channels_last ? 1 : 32 / tiling.lanes;
}

inline GroupNormPlan one_pass(const GroupNormTiling& tiling, const GroupNormPass& pass,
                              int64_t groups, int64_t element_size, int cluster) {
  GroupNormPlan plan{};
  plan.tiling = tiling;
  plan.one_pass = true;
  plan.cluster = cluster;
  plan.items_per_block = static_cast<int>(ceil_div(tiling.items(), cluster));
  const int64_t warps = ceil_div(plan.items_per_block, items_per_warp(tiling));
  plan.threads = static_cast<int>(32 * clamp(warps, 1, kGroupNormThreads / 32));
  const int64_t data = pass.tensors * plan.items_per_block * tiling.item_numel() * element_size;
  const int64_t partials = plan.items_per_block * tiling.block_channels * pass.partial;
  const int64_t channels = tiling.channels * (pass.partial + pass.coefficients);
  const int64_t floats = partials + channels + 2 * groups;
  plan.shared_bytes = ceil_div(ceil_div(data, 16) * 16 + 4 * floats, 16) * 16;
  plan.samples = 1;
  return plan;
}

// Samples side by side in a block, which adds up what they say about weight and bias: on small maps
// what would be written and read for that is a part of the traffic. Twice as many until it is a
// 24th, as long as they divide the batch, leave the device enough blocks (of 4 KB at most, if those
// are fewer), and leave a multiprocessor room for two.
inline int samples_per_block(const GroupNormLayout& layout, const GroupNormPlan& plan,
                             const GroupNormPass& pass, int64_t element_size,
                             const DeviceLimits& device) {
  const int64_t row = 2 * 4 * pass.row, sample = layout.pixels * element_size;
  const int64_t batch = layout.batch * layout.channels * sample;
  const int64_t enough = clamp(batch >> 12, 1, device.multiprocessors * 7 / 8);
  int samples = 1;
  while (24 * row > samples * (pass.tensors + 1) * sample) {
    const int64_t next = 2 * samples;
    const bool fits = next * plan.threads <= kGroupNormThreads &&
                      2 * next * plan.shared_bytes <= device.shared_bytes;
    if (!fits || layout.batch % next || layout.batch / next * plan.blocks_per_sample < enough)
      break;
    samples = static_cast<int>(next);
  }
  return samples;
}

// Chunks of 8 to 64 KB, so that one sample gives two blocks to every multiprocessor if it can; in
// channels_last 64 bytes wide, as wider ones would read the operands of, and leave the sums of,
// more channels.
inline GroupNormPlan split(const GroupNormLayout& layout, int vector, int64_t element_size,
                           const DeviceLimits& device) {
  constexpr int kWarps = kGroupNormSplitThreads / 32;
  const int64_t sample = layout.channels * layout.pixels * element_size;
  const int64_t chunk = clamp(sample / (2 * device.multiprocessors), 8 << 10, 64 << 10);
  GroupNormPlan plan{};
  const int64_t widest = vector == 1 ? 32 : 64 / (vector * element_size);
  plan.tiling = tile(layout, layout.channels, vector, element_size, chunk / kWarps, widest);
  const GroupNormTiling& tiling = plan.tiling;
  plan.cluster = 1;
  plan.samples = 1;
  plan.threads = kGroupNormSplitThreads;
  plan.chunk_segments = tiling.segments < kWarps ? tiling.segments : kWarps;
  plan.chunk_blocks = 1;
  if (tiling.segments <= kWarps) {
    // Limits on what a block keeps per channel (coefficients) and per item (partial sums).
    const int64_t bytes = tiling.segments * tiling.item_numel() * element_size;
    const int64_t most = clamp(4096 / plan.chunk_partials(), 1, 1024 / tiling.block_channels);
    plan.chunk_blocks = static_cast<int>(clamp(chunk / bytes, 1, most));
  }
  plan.chunks = static_cast<int>(ceil_div(tiling.segments, plan.chunk_segments));
  plan.blocks_per_sample = ceil_div(tiling.blocks, plan.chunk_blocks) * plan.chunks;
  return plan;
}

}  // namespace group_norm_plan

// Without a second pixel the layouts are one, and the work of channels_last is the more even.
inline GroupNormLayout canonical(GroupNormLayout layout) {
  layout.channels_last = layout.channels_last || layout.pixels == 1;
  return layout;
}

// The one place that chooses. `vector` is the number of elements per access: 16 bytes where sizes
// and pointers allow it, else 1. `layout` is canonical.
//
// One pass, if the groups that share sectors fit into the shared memory of one block, or of the
// smallest possible cluster; else split. Where clusters exist, blocks are halved further as long as
// the grid leaves more than an eighth of the device idle, or there is more than one block per
// multiprocessor and no room for two (so that one reads while the other writes); down to 2 KB per
// block and to where the operands, which every block reads, come to 4 % of it. Clusters of more
// than kPortableCluster blocks find room less easily: they are for what fits no other way, and for
// an idle device and 8 KB per block.
inline GroupNormPlan plan_group_norm(const GroupNormLayout& layout, int vector,
                                     int64_t element_size, const GroupNormPass& pass,
                                     const DeviceLimits& device) {
  using namespace group_norm_plan;
  constexpr int64_t kItemBytes = 2 << 10, kMaxItems = 256;
  const int64_t channels = unit_channels(layout, vector, element_size);
  const int64_t units = layout.channels / channels;
  const int64_t groups = channels / layout.group_channels();
  const int64_t unit_bytes = channels * layout.pixels * element_size;
  if (unit_bytes / device.max_cluster <= device.shared_bytes) {
    const int64_t per_item = ceil_div(unit_bytes, kMaxItems);
    const GroupNormTiling tiling =
        tile(layout, channels, vector, element_size, per_item > kItemBytes ? per_item : kItemBytes);
    GroupNormPlan plan{};
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
      if (cluster > 1 && plan.one_pass) {
        const int64_t blocks = layout.batch * units * plan.cluster;
        const bool crowded =
            blocks > device.multiprocessors && 2 * plan.shared_bytes > device.shared_bytes;
        const bool idle = blocks < device.multiprocessors * 7 / 8;
        const bool portable = cluster <= kPortableCluster;
        const int64_t least = clamp(100 * channels, portable ? kItemBytes : 8 << 10, unit_bytes);
        const bool small = unit_bytes < cluster * least || tiling.items() < cluster;
        if (small || !(idle || (crowded && portable))) break;
      }
      const GroupNormPlan next = one_pass(tiling, pass, groups, element_size, cluster);
      if (next.shared_bytes <= device.shared_bytes) plan = next;
    }
    plan.blocks_per_sample = units * plan.cluster;
    if (plan.cluster == 1)
      plan.samples = samples_per_block(layout, plan, pass, element_size, device);
    if (plan.one_pass) return plan;
  }
  return split(layout, vector, element_size, device);
}

}  // namespace fastdiff
