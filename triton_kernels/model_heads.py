"""Model outputs with two heads, 2C channels: those of the prediction, then those of the variance.

The twin of csrc/include/fastdiff/model_heads.cuh. In a channels_last tensor the heads alternate, C
and C, from pixel to pixel. With few channels a program moves the 2C channels of its pixels as one
tile of consecutive elements, and gathers the elements of each head from that tile.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._layout import SampleLayout

# Beyond these many channels a head of a pixel is long enough for whole accesses.
MAX_STAGED_CHANNELS = 16


class HeadPlan(NamedTuple):
    """How programs of `block` elements divide a sample."""

    staged: bool  # the model output goes through a tile
    span: int  # elements per block: all of them, or with a tile whole pixels


def plan_heads(layout: SampleLayout, two_heads: bool, block: int) -> HeadPlan:
    if two_heads and 1 < layout.inner <= MAX_STAGED_CHANNELS:
        return HeadPlan(True, block // layout.inner // 16 * 16 * layout.inner)
    return HeadPlan(False, block)


@triton.jit
def head_index(base, i, numel, inner, TWO_HEADS: tl.constexpr, LOGICAL_ORDER: tl.constexpr):
    """Where the predictions of elements i of a sample are, and how far behind their variances."""
    index = base + i
    to_variance = numel
    if TWO_HEADS:
        if LOGICAL_ORDER:
            index = 2 * base + i
        else:
            index = 2 * base + i + i // inner * inner
            to_variance = inner
    return index, to_variance


@triton.jit
def load_tile(output, base, first, count, BLOCK: tl.constexpr):
    """The 2 `count` channels of the pixels of elements first .. first + count - 1 of a sample."""
    j = tl.arange(0, 2 * BLOCK)
    return tl.load(output + 2 * (base + first) + j, mask=j < 2 * count, other=0.0)


@triton.jit
def head_of_tile(tile, inner, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Head 0 or 1 of every element."""
    e = tl.arange(0, BLOCK)
    j = 2 * e - e % inner + HEAD * inner
    return tl.gather(tile, tl.minimum(j, 2 * BLOCK - 1), 0).to(tl.float32)


@triton.jit
def store_tile(output, prediction, variance, base, first, count, inner, BLOCK: tl.constexpr):
    """The inverse of load_tile and head_of_tile."""
    j = tl.arange(0, 2 * BLOCK)
    pixel = j // (2 * inner)
    channel = j - pixel * (2 * inner)
    head = (channel >= inner).to(tl.int32)
    e = tl.minimum(pixel * inner + channel - head * inner, BLOCK - 1)
    both = tl.reshape(tl.join(prediction, variance), (2 * BLOCK,))
    tile = tl.gather(both, 2 * e + head, 0)
    tl.store(output + 2 * (base + first) + j, tile, mask=j < 2 * count)
