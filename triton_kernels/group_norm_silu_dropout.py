"""Dropout in the kernels of group_norm_silu: csrc/include/fastdiff/dropout.h.

A tile whose rows are fours of channels takes 1/16 Philox block per element, as each block decides
for 4 channels at 4 pixels; fewer pixels a thread or other rows take up to 1/4.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .philox import dropout_bytes, dropout_words, dropout_words_of_rows


class Mask(NamedTuple):
    """Of dropout in one sample, made as in csrc/include/fastdiff/dropout.h."""

    key: tl.tensor
    stream: tl.tensor
    threshold: tl.tensor


@triton.jit
def keep_scale(threshold):
    """What elements that dropout keeps are multiplied with."""
    return tl.div_rn(256.0, (256 - threshold).to(tl.float32))


@triton.jit
def words_of_tile(dropout, rows, first_pixel, pixels, TILING: tl.constexpr):
    """Dropout's words for a tile, or a piece of one: [rows, pixels / 4]."""
    CH: tl.constexpr = TILING.tile_channels
    ROWS: tl.constexpr = TILING.segments * CH
    WORDS: tl.constexpr = (TILING.tile_pixels // TILING.pieces + 3) // 4
    # Whether the rows are fours of channels that share blocks.
    FOURS: tl.constexpr = TILING.groups * TILING.group_channels % 4 == 0 and CH % 4 == 0
    STEP: tl.constexpr = 4 if FOURS else 1
    c = tl.arange(0, ROWS // STEP)[:, None] * STEP
    p = tl.arange(0, WORDS)[None, :] * 4
    if TILING.segments > 1:
        p += c // CH * TILING.tile_pixels
        c %= CH
    channel = rows.first + c
    block = (channel >> 2) * ((pixels + 3) >> 2) + ((first_pixel + p) >> 2)
    if FOURS:
        words = dropout_words(dropout.key, dropout.stream, block, ROWS)
    else:
        words = dropout_words_of_rows(dropout.key, dropout.stream, block, channel)
    return words


@triton.jit
def dropped(values, dropout, rows, first_pixel, pixels, TILING: tl.constexpr):
    """`values` of a tile, or a piece of one, with 0 for those that dropout drops."""
    words = words_of_tile(dropout, rows, first_pixel, pixels, TILING)
    decisions = dropout_bytes(words, values.shape[0], values.shape[1])
    return tl.where(decisions >= dropout.threshold, values, 0.0)
