// The host function that chooses between the kernels of group_norm_silu, for group_norm_plan.py.

#include "fastdiff/group_norm_silu_plan.cuh"

// Numbers out, in the order of Plan there.
extern "C" void plan_of(const fastdiff::GroupNormLayout* given, int vector, long element_size,
                        int backward, long shared_bytes, int multiprocessors, int max_cluster,
                        long* out) {
  using namespace fastdiff;
  const GroupNormPlan plan = plan_group_norm(canonical(*given), vector, element_size,
                                             backward ? kGroupNormBackward : kGroupNormForward,
                                             {shared_bytes, multiprocessors, max_cluster});
  const GroupNormTiling& t = plan.tiling;
  const long values[] = {plan.one_pass,
                         plan.cluster,
                         plan.threads,
                         plan.shared_bytes,
                         plan.blocks_per_sample,
                         plan.items_per_block,
                         plan.chunk_blocks,
                         plan.chunk_segments,
                         plan.chunks,
                         t.channels_last,
                         t.channels,
                         t.block_channels,
                         t.blocks,
                         t.segments,
                         t.segment_pixels,
                         t.lanes,
                         plan.samples};
  for (const long value : values) *out++ = value;
}
