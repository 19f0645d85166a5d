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
// Launch bound of the kernels that walk over items: more threads than a block ever has, so that
// each has at most 80 registers and 24 warps find room on a multiprocessor, whatever the blocks.
constexpr int kGroupNormBound = 768;
constexpr int kGroupNormRegisters = 80;
// Of those that hold more than the plain ones beside the coefficients of eight channels: 96
// registers, 21 warps.
constexpr int kGroupNormWideBound = 640;
constexpr int64_t kLaneElements = 64;  // of a thread, over which its other work is spread
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
  int lane_bits;           // log2 of lanes
  int row;                 // vectors of an item side by side: channels_last: of a pixel, else lanes
  int item_vectors;
  int64_t step;  // elements from a vector of a lane to its next

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
  int cluster_bits;     // log2 of it
  int items_per_block;  // one pass
  int chunk_blocks;     // split
  int chunk_segments;
  int chunks;           // per channel
  int samples;          // one pass: of a block, side by side
  int threads;          // per sample of a block
  int padded_channels;  // that coefficients on chip have room for
  // One pass: the groups of a unit, and how they are finished: the sums of a channel, in `parts`
  // parts, by 2^part_bits lanes, those of a group by 2^group_bits.
  int groups;
  int group_channels;
  int parts;
  int part_bits;
  int group_bits;
  int64_t blocks_per_sample;
  // One pass, per sample of a block: all, and the items.
  int64_t shared_bytes;
  int64_t data_bytes;

  FASTDIFF_HD int chunk_channels() const { return chunk_blocks * tiling.block_channels; }
  FASTDIFF_HD int chunk_partials() const { return chunk_channels() * chunk_segments; }
};

// What differs between the passes: tensors kept on chip, floats of a partial sum, floats of
// coefficients per channel, floats per group, and floats per channel that a block leaves to be
// added up over the batch.
struct GroupNormPass {
  int tensors;
  int partial;
  int coefficients;
  int statistics;
  int row;
};
constexpr GroupNormPass kGroupNormForward = {1, 2, 3, 0, 0};
constexpr GroupNormPass kGroupNormBackward = {2, 3, 5, 3, 2};
constexpr GroupNormPass kGroupNormSumBackward = {2, 4, 5, 3, 3};  // of a residual sum

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

constexpr int log2_of(int power) {
  int bits = 0;
  while (power > 1) power /= 2, ++bits;
  return bits;
}

// `item_bytes` is what an item should have. Items are whole batches of four vectors per lane where
// there is enough. In channels_last they are `widest` vectors wide, or less.
inline GroupNormTiling tile(const GroupNormLayout& layout, int64_t channels, int vector,
                            int64_t element_size, int64_t item_bytes, int64_t widest = 32) {
  GroupNormTiling tiling{};
  tiling.channels_last = layout.channels_last;
  tiling.channels = static_cast<int>(channels);
  int64_t width = vector, extent = layout.pixels / vector;  // bytes of a step, steps of a block
  if (layout.channels_last) {
    const int64_t vectors = channels / vector, even = vectors & -vectors;
    if (even * vector * element_size >= kSectorBytes) {
      width = (even < widest ? even : widest) * vector;  // no lane idles
    } else {
      // Strips of equal width and of whole sectors.
      const int64_t strips = ceil_div(vectors, widest);
      width = ceil_div(ceil_div(vectors, strips), 2) * 2 * vector;
      width = width < channels ? width : channels;
    }
    extent = layout.pixels;
  }
  tiling.block_channels = static_cast<int>(layout.channels_last ? width : 1);
  tiling.blocks = static_cast<int>(ceil_div(channels, tiling.block_channels));
  // Lanes for so many steps: in the contiguous layout eight for each, but two lanes at least, whose
  // vectors of 16 bytes are a sector.
  const auto lanes = [&](int64_t steps) {
    if (layout.channels_last) return lanes_for(width / vector);
    const int least = lanes_for(steps < 2 ? steps : 2), most = lanes_for(ceil_div(steps, 8));
    return most < least ? least : most;
  };
  const int side = lanes(extent);
  const int64_t batch = 4 * (layout.channels_last ? 32 / side : side);
  int64_t segment = clamp(ceil_div(item_bytes, width * element_size), 1, extent);
  segment = ceil_div(extent, ceil_div(extent, segment));
  if (segment > batch) segment = ceil_div(segment, batch) * batch;
  segment = segment < extent ? segment : extent;
  tiling.segments = static_cast<int>(ceil_div(extent, segment));
  tiling.segment_pixels = layout.channels_last ? segment : segment * vector;
  tiling.lanes = lanes(segment);
  tiling.lane_bits = log2_of(tiling.lanes);
  tiling.row = layout.channels_last ? tiling.block_channels / vector : tiling.lanes;
  tiling.item_vectors = static_cast<int>(tiling.item_numel() / vector);
  tiling.step = layout.channels_last ? 32 / tiling.lanes * layout.channels : tiling.lanes * vector;
  return tiling;
}

// Channels that stay together on chip: one group; in channels_last as many as fill whole sectors,
// or whole vectors, or (without vectors) the lanes of a warp. Of a small map several times as many,
// up to `enough` bytes; if it is tiny, samples go side by side instead.
inline int64_t unit_channels(const GroupNormLayout& layout, int vector, int64_t element_size,
                             int64_t enough) {
  const int64_t size = layout.group_channels();
  int64_t channels = size;
  if (layout.channels_last && vector == 1) {
    int64_t groups = 1;
    for (int64_t s = 2; s * size <= 32; ++s) groups = layout.groups % s == 0 ? s : groups;
    channels = groups * size;
  } else if (layout.channels_last) {
    int64_t step = kSectorBytes / element_size;
    if (layout.channels % step) step = vector;
    channels = size / gcd(size, step) * step;
  }
  constexpr int64_t kTinyMap = 32;  // pixels
  const int64_t channel_bytes = layout.pixels * element_size;
  while (layout.pixels > kTinyMap && 2 * channels * channel_bytes <= enough &&
         layout.channels % (2 * channels) == 0) {
    channels *= 2;
  }
  return channels;
}

inline int items_per_warp(const GroupNormTiling& tiling) {
  return tiling.channels_last ? 1 : 32 / tiling.lanes;
}

// Blocks of `samples` samples that a multiprocessor has room for.
inline int64_t resident_blocks(const GroupNormPlan& plan, int samples, const DeviceLimits& device) {
  constexpr int64_t kReserved = 1 << 10;  // shared memory of every block that the driver takes
  constexpr int64_t kWarps = (64 << 10) / (32 * kGroupNormRegisters), kBlocks = 24;
  const int64_t by_registers = kWarps / (samples * plan.threads / 32);
  const int64_t by_shared =
      (device.shared_bytes + kReserved) / (samples * plan.shared_bytes + kReserved);
  const int64_t fewest = by_registers < by_shared ? by_registers : by_shared;
  return fewest < kBlocks ? fewest : kBlocks;
}

inline GroupNormPlan one_pass(const GroupNormLayout& layout, const GroupNormTiling& tiling,
                              const GroupNormPass& pass, int64_t element_size, int cluster,
                              const DeviceLimits& device) {
  constexpr int kFewParts = 8;
  GroupNormPlan plan{};
  plan.tiling = tiling;
  plan.one_pass = true;
  plan.cluster = cluster;
  plan.cluster_bits = log2_of(cluster);
  plan.samples = 1;
  plan.items_per_block = static_cast<int>(ceil_div(tiling.items(), cluster));
  plan.padded_channels = static_cast<int>(ceil_div(tiling.channels, 4) * 4);
  plan.group_channels = static_cast<int>(layout.group_channels());
  plan.groups = tiling.channels / plan.group_channels;
  plan.parts = tiling.segments <= kFewParts ? tiling.segments : 1;
  plan.part_bits = log2_of(lanes_for(plan.parts));
  plan.group_bits = log2_of(lanes_for(int64_t{plan.group_channels} << plan.part_bits));
  plan.blocks_per_sample = layout.channels / tiling.channels * cluster;

  const int64_t data = pass.tensors * plan.items_per_block * tiling.item_numel() * element_size;
  const int64_t partials = plan.items_per_block * tiling.block_channels * pass.partial;
  const int64_t channels = plan.padded_channels * (pass.partial + pass.coefficients);
  const int64_t floats = partials + channels + pass.statistics * plan.groups;
  plan.data_bytes = ceil_div(data, 16) * 16;
  plan.shared_bytes = ceil_div(plan.data_bytes + 4 * floats, 16) * 16;

  // Half of the threads where two blocks find room, all where one does; where blocks fill the
  // device no more than have enough to do. In even rounds of items.
  const int64_t warps = ceil_div(plan.items_per_block, items_per_warp(tiling));
  const bool alone = 2 * plan.shared_bytes > device.shared_bytes;
  int64_t most = kGroupNormThreads / (alone ? 32 : 64);
  if (layout.batch * plan.blocks_per_sample >= device.multiprocessors) {
    const int64_t numel = plan.items_per_block * tiling.item_numel();
    most = clamp(numel / (32 * kLaneElements), 1, most);
  }
  plan.threads = static_cast<int>(32 * ceil_div(warps, ceil_div(warps, most)));
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
  plan.padded_channels = static_cast<int>(ceil_div(plan.chunk_channels(), 4) * 4);
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
// the grid leaves more than an eighth of the device idle, or a multiprocessor has room for one
// block only and would have it for two (one reads while the other writes); down to 2 KB per block
// and to where the operands, which every block reads, come to 4 % of it. Clusters of more than
// kPortableCluster blocks find room less easily: they are for what fits no other way, and for an
// idle device and 8 KB per block.
inline GroupNormPlan plan_group_norm(const GroupNormLayout& layout, int vector,
                                     int64_t element_size, const GroupNormPass& pass,
                                     const DeviceLimits& device) {
  using namespace group_norm_plan;
  constexpr int64_t kItemBytes = 4 << 10, kLeast = 2 << 10, kMaxItems = 256;
  const int64_t channels = unit_channels(layout, vector, element_size, kItemBytes);
  const int64_t units = layout.channels / channels;
  const int64_t unit_bytes = channels * layout.pixels * element_size;
  if (unit_bytes / device.max_cluster <= device.shared_bytes) {
    const int64_t per_item = ceil_div(unit_bytes, kMaxItems);
    const GroupNormTiling tiling =
        tile(layout, channels, vector, element_size, per_item > kItemBytes ? per_item : kItemBytes);
    GroupNormPlan plan{};
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
      const GroupNormPlan next = one_pass(layout, tiling, pass, element_size, cluster, device);
      if (cluster > 1 && plan.one_pass) {
        const int64_t blocks = layout.batch * units * plan.cluster;
        const bool portable = cluster <= kPortableCluster;
        const bool lonely = blocks > device.multiprocessors &&
                            resident_blocks(plan, 1, device) < 2 &&
                            resident_blocks(next, 1, device) > 1;
        const bool idle = blocks < device.multiprocessors * 7 / 8;
        const int64_t least = clamp(100 * channels, portable ? kLeast : 8 << 10, unit_bytes);
        const bool small = unit_bytes < cluster * least || tiling.items() < cluster;
        if (small || !(idle || (lonely && portable))) break;
      }
      if (next.shared_bytes <= device.shared_bytes) plan = next;
    }
    if (plan.cluster == 1)
      plan.samples = samples_per_block(layout, plan, pass, element_size, device);
    if (plan.one_pass) return plan;
  }
  return split(layout, vector, element_size, device);
}

}  // namespace fastdiff
