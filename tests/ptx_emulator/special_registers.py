"""What the special registers of PTX hold, as C++ expressions."""

from __future__ import annotations

SPECIAL_REGISTERS: dict[str, str] = {
    "%laneid": "thread->lane",
    "%warpid": "thread->index / 32",
    "%nwarpid": "launch.warp_count",
    "%smid": "launch.blocks_done % 132",
    "%nsmid": "132",
    "%gridid": "0",
    "%clock": "thread->loop_ticks++",
    "%clock_lo": "thread->loop_ticks++",
    "%clock_hi": "0",
    "%clock64": "thread->loop_ticks++",
    "%globaltimer": "(u64)(1e9 * now_seconds())",
    "%globaltimer_lo": "(u64)(1e9 * now_seconds())",
    "%globaltimer_hi": "(u64)(1e9 * now_seconds()) >> 32",
    "%lanemask_eq": "1u << thread->lane",
    "%lanemask_lt": "(1u << thread->lane) - 1",
    "%lanemask_le": "(2u << thread->lane) - 1",
    "%lanemask_gt": "~((2u << thread->lane) - 1)",
    "%lanemask_ge": "~((1u << thread->lane) - 1)",
    "%dynamic_smem_size": "launch.dynamic_shared_bytes",
    "%total_smem_size": "launch.shared_bytes",
    "%is_explicit_cluster": "launch.explicit_cluster",
    "%cluster_ctarank": "thread->block->rank",
    "%cluster_nctarank": "launch.cluster_size",
    "WARP_SZ": "32",
}
for _index, _axis in enumerate("xyz"):
    SPECIAL_REGISTERS[f"%tid.{_axis}"] = f"thread->{_axis}"
    SPECIAL_REGISTERS[f"%ctaid.{_axis}"] = f"thread->block->{_axis}"
    SPECIAL_REGISTERS[f"%ntid.{_axis}"] = f"launch.block[{_index}]"
    SPECIAL_REGISTERS[f"%nctaid.{_axis}"] = f"launch.grid[{_index}]"
    _cluster = f"launch.cluster[{_index}]"
    SPECIAL_REGISTERS[f"%clusterid.{_axis}"] = f"thread->block->{_axis} / {_cluster}"
    SPECIAL_REGISTERS[f"%nclusterid.{_axis}"] = f"launch.grid[{_index}] / {_cluster}"
    SPECIAL_REGISTERS[f"%cluster_ctaid.{_axis}"] = f"thread->block->{_axis} % {_cluster}"
    SPECIAL_REGISTERS[f"%cluster_nctaid.{_axis}"] = _cluster
