"""Bytes that emulated launches moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def sampled(launch: Any) -> float:
    """Blocks of the grid per block that ran: above 1 where `last_blocks` left some out."""
    return math.prod(launch.grid) / launch.blocks


def moved_bytes(launches: Sequence[Any], large: int) -> int:
    """Bytes to and from memory of launches run with `count=True`.

    Arrays of at least `large` bytes count every request of a warp; what is smaller (tables, partial
    sums) stays in the caches, and counts each byte read once. Blocks that did not run count as much
    as those that did.
    """
    total = 0.0
    for launch in launches:
        for array in launch.counters.arrays:
            loaded = array.load_requests.bytes * sampled(launch)
            if array.size < large:
                loaded = min(array.size, array.unique_loaded_bytes * sampled(launch))
            total += loaded + array.stored_bytes * sampled(launch)
    return round(total)
