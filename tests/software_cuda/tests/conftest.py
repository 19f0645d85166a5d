"""Tests of the device itself: `pytest --software-cuda=devices=2 -m gpu tests/software_cuda`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from software_cuda import build, device


@pytest.fixture(autouse=True)
def software_device() -> Any:
    if not device.active:
        pytest.skip("about the software CUDA device: pytest --software-cuda")
    return device


class Launchers:
    """The host functions of kernels.cu, on tensors; they return a cudaError_t."""

    def __init__(self) -> None:
        path = build.small_library(Path(__file__).parent / "kernels.cu", device.settings.arch)
        self._library = ctypes.CDLL(str(path))

    def fill(self, x: int | Tensor, value: float, n: int, stream: Any = None) -> int:
        return self._library.fill(
            _pointer(x), ctypes.c_float(value), ctypes.c_long(n), _handle(stream)
        )

    def twice(self, x: Tensor, y: Tensor, stream: Any = None) -> int:
        n = ctypes.c_long(x.numel())
        return self._library.twice(_pointer(x), _pointer(y), n, _handle(stream))

    def reverse(self, x: Tensor, shared_bytes: int, ask: bool) -> int:
        return self._library.reverse(_pointer(x), shared_bytes, int(ask), _handle(None))

    def padded(self, x: int | Tensor, stale: int, n: int) -> int:
        """Fills x with 7. The struct that holds x has the bytes of `stale` in its padding."""
        stale_word = ctypes.c_uint64(stale)
        return self._library.padded(_pointer(x), stale_word, ctypes.c_long(n), _handle(None))

    def indexed(self, x: int | Tensor, y: int | Tensor, index: int, n: int) -> int:
        """Fills x or y with 1."""
        return self._library.indexed(_pointer(x), _pointer(y), index, n, _handle(None))


def _pointer(x: int | Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x if isinstance(x, int) else x.data_ptr())


def _handle(stream: Any) -> ctypes.c_void_p:
    import torch

    return ctypes.c_void_p((stream or torch.cuda.current_stream()).cuda_stream)


@pytest.fixture(scope="session")
def launchers() -> Launchers:
    return Launchers()
