"""Builds the launchers of one op with the emulator as their device, and calls them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import ptx_emulator
import torch
from torch import Tensor

_CSRC = pathlib.Path(__file__).resolve().parents[3] / "csrc"
DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.uint8: 3,
    torch.float64: 4,
}


class SampleLayout(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "numel", "inner", "width")]


class NoiseSource(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
    ]


@functools.cache
def library(stem: str, arch: str) -> Any:
    """The launchers of csrc/cuda/<stem>*.cu: one op's kernels compile without the others'."""
    return ptx_emulator.build_launchers(
        sorted((_CSRC / "cuda").glob(f"{stem}*.cu")),
        include_dirs=[_CSRC / "include", _CSRC / "cuda"],
        arch=arch,
        flags=["-std=c++20", "--expt-relaxed-constexpr"],
    )


_arch = "sm_90"


@contextlib.contextmanager
def emulated_launches(
    stem: str, arch: str = "sm_90", racecheck: bool = True, **options: Any
) -> Iterator[list[Any]]:
    """Inside, the op's functions compile for `arch`. Yields the list of launches."""
    global _arch
    previous, _arch = _arch, arch
    try:
        with library(stem, arch).options(racecheck=racecheck, **options) as launches:
            yield launches
    finally:
        _arch = previous


def function(stem: str, name: str) -> Any:
    """A host function of the op's launchers, for the architecture in force."""
    return library(stem, _arch)[name]


def layout_of(x: Tensor, channels_last: bool) -> SampleLayout:
    return SampleLayout(
        x.shape[0],
        math.prod(x.shape[1:]),
        x.shape[1] if channels_last else 1,
        x.shape[-1] if x.dim() > 1 else 1,
    )


def noise_source(keys: Tensor | None, seed: int | None, stream: int) -> NoiseSource:
    mask = (1 << 64) - 1
    return NoiseSource(pointer(keys), (seed or 0) & mask, stream & mask)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def launch(stem: str, name: str, args: ctypes.Structure, tensors: dict[str, Tensor | None]) -> None:
    lib = library(stem, _arch)
    memory = {k: v for k, v in tensors.items() if v is not None and v.numel()}
    with lib.memory(**memory):
        error = lib[name](ctypes.c_void_p(ctypes.addressof(args)), None)
    assert error == 0, f"{name} returned CUDA error {error}: {lib.refused[-1:]}"
