"""Argument checks shared by the ops: one clear message, raised before any kernel runs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastdiff.reference.philox import to_int64

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEBUG = os.environ.get("FASTDIFF_DEBUG", "0") == "1"

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1


def fail_dtype(op: str, name: str, given: torch.dtype, expected: str) -> None:
    raise TypeError(f"{op}: {name} has dtype {given}, expected {expected}")


def check_timesteps(op: str, t: Tensor, batch: int, device: torch.device, num: int) -> None:
    """t must be int64 (batch,) on `device` with 0 <= t < num.

    The range is checked where that needs no synchronization (CPU), or under FASTDIFF_DEBUG=1.
    """
    if t.dtype != torch.int64:
        fail_dtype(op, "t", t.dtype, "torch.int64")
    if t.dim() != 1 or t.shape[0] != batch:
        raise ValueError(
            f"{op}: t has shape {tuple(t.shape)}, expected ({batch},), one timestep per sample"
        )
    if t.device != device:
        raise ValueError(f"{op}: t is on {t.device}, expected {device}, where x0 is")
    # The native CPU kernel checks the range itself, without the cost of these reductions.
    if DEBUG and not torch.compiler.is_compiling():
        check_timestep_range(op, t, num)


def check_timestep_range(op: str, t: Tensor, num: int) -> None:
    if t.numel() and bool(((t < 0) | (t >= num)).any()):
        raise IndexError(
            f"{op}: t has values from {int(t.min())} to {int(t.max())}, "
            f"expected 0 <= t < {num}, the length of the tables"
        )


def check_tables(op: str, device: torch.device, **tables: Tensor) -> int:
    """All tables must be floating-point (T,) of one length on `device`. Returns T."""
    length = -1
    for name, table in tables.items():
        if table.dim() != 1:
            raise ValueError(
                f"{op}: {name} has shape {tuple(table.shape)}, expected (T,), one value per "
                "timestep"
            )
        if not table.is_floating_point():
            fail_dtype(op, name, table.dtype, "torch.float32")
        if table.device != device:
            raise ValueError(f"{op}: {name} is on {table.device}, expected {device}, where x0 is")
        if length not in (-1, table.shape[0]):
            raise ValueError(
                f"{op}: {name} has {table.shape[0]} entries, expected {length} as in the other "
                "tables"
            )
        length = table.shape[0]
    return length


def check_seed(
    op: str, seed: int | Tensor, batch: int, device: torch.device
) -> tuple[Tensor | None, int | None]:
    """Split `seed` into (keys, None) or (None, signed 64-bit integer)."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            fail_dtype(op, "seed", seed.dtype, "torch.int64 keys (B,), or a Python int")
        if seed.dim() != 1 or seed.shape[0] != batch:
            raise ValueError(
                f"{op}: seed has shape {tuple(seed.shape)}, expected ({batch},), one key per sample"
            )
        if seed.device != device:
            raise ValueError(f"{op}: seed is on {seed.device}, expected {device}, where x0 is")
        return seed, None
    return None, check_int64(op, "seed", seed)


def check_int64(op: str, name: str, value: int) -> int:
    """Any Python int, reduced to the signed 64-bit integer with the same low 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} is {value!r}, expected an int")
    if _INT64_MIN <= value <= _INT64_MAX:
        return value
    return to_int64(value)
