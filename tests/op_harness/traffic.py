"""Bytes that emulated launches moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def moved_bytes(launches: Sequence[Any], large: int) -> int:
    """Bytes to and from memory of launches run with `count=True`.

    Arrays of at least `large` bytes count every access; what is smaller (tables, partial sums)
    stays in the caches, and counts each byte read once.
    """
    total = 0
    for launch in launches:
        for array in launch.counters.arrays:
            loaded = array.loaded_bytes if array.size >= large else array.unique_loaded_bytes
            total += loaded + array.stored_bytes
    return total
