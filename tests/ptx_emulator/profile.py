"""How often a launch executed each instruction."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from .translator import Translation

_MAX_THREADS = 1024  # kMaxThreads of runtime/state.h
_WARP = 32


@dataclass(frozen=True)
class Executed:
    """Instructions between two labels or branches, of which all execute or none.

    threads: how often threads executed them; predicated ones count whether or not they do anything.
    warps: how often warps issued them, which is the most that any lane of a warp executed them.
        A device issues more only where lanes of a warp take turns.
    """

    instructions: tuple[str, ...]
    threads: int
    warps: int


def _counters(library: ctypes.CDLL, translation: Translation) -> np.ndarray:
    library.ptx_profile.restype = ctypes.POINTER(ctypes.c_uint64)
    shape = (_MAX_THREADS, max(1, len(translation.straight_lines)))
    return np.ctypeslib.as_array(library.ptx_profile(), shape)


def reset_profile(library: ctypes.CDLL, translation: Translation) -> None:
    _counters(library, translation)[:] = 0


def read_profile(library: ctypes.CDLL, translation: Translation) -> tuple[Executed, ...]:
    """The counts since `reset_profile`, without what never ran."""
    counts = _counters(library, translation)
    threads = counts.sum(axis=0)
    warps = counts.reshape(-1, _WARP, counts.shape[1]).max(axis=1).sum(axis=0)
    return tuple(
        Executed(line, int(n), int(m))
        for line, n, m in zip(translation.straight_lines, threads, warps, strict=False)
        if n
    )
