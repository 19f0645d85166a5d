"""Makes small shapes take each of the Triton kernels of group_norm_silu."""

from __future__ import annotations

from typing import Any

import pytest

# By the kernels that are to run, what of `group_norm_silu_plan` is another.
_PLANS: dict[str, dict[str, Any]] = {
    "one pass": {},
    # Nothing fits in registers, tiles are small, and a program of a reduction adds up several.
    "split": {"HELD": 0, "HELD_CROWDED": 0, "SPLIT_ELEMENTS": 512, "REDUCTION_PROGRAMS": 4},
    # So little fits in a block's registers that a program is a cluster.
    "cluster": {"HELD": 128, "HELD_CROWDED": 256},
    # A block can hold 1024 values, or 2048 in pairs, in four pieces.
    "pieces": {"HELD": 1024, "HELD_CROWDED": 1024, "_pieces": lambda *tile: 4},
}


def choose_kernels(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from fastdiff.triton_kernels import _launch
    from fastdiff.triton_kernels import group_norm_silu_plan as plans

    if kernels == "cluster" and not _launch.compiles_clusters(triton.__version__):
        pytest.skip("this Triton cannot add up over the blocks of a cluster")
    for name, value in _PLANS[kernels].items():
        monkeypatch.setattr(plans, name, value)
    plans.plan.cache_clear()
