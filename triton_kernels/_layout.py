"""How the elements of every sample lie in memory: the twin of csrc/include/fastdiff/layout.h."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SampleLayout(NamedTuple):
    """Memory index i of a sample is (row * width + w) * inner + c; inner is 1 if contiguous."""

    batch: int
    numel: int
    inner: int
    width: int


def sample_layout(x: Tensor, channels_last: bool) -> SampleLayout:
    return SampleLayout(
        batch=x.shape[0],
        numel=math.prod(x.shape[1:]),
        inner=x.shape[1] if channels_last else 1,
        width=x.shape[-1] if x.dim() > 1 else 1,
    )


def block_elements(dtype: torch.dtype) -> int:
    """Elements per program: 16 bytes of the result for each of 128 threads."""
    return 128 * 16 // dtype.itemsize
