"""What the forward and backward kernels of group_norm_silu share: tiles, operands, formulas.

A tile is [channels, pixels] of one sample in both memory formats; which of the two is contiguous is
left to the offsets, from which the compiler finds 16-byte accesses. Its channels belong to a span:
GROUPS whole groups, GROUP_CHANNELS channels each. A span of more than CH channels is cut.

A tile that a cluster holds is [rows, pixels]: the channels of a first segment of pixels, those of a
second, and so on, as the compiler gives each block of the cluster as many rows. Were the rows
channels, they would be too few for 16 bytes in channels_last, and Triton 3.8 fails to compile fewer
rows than blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU, IDENTITY = (tl.constexpr(k) for k in range(2))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == IDENTITY:
        return z
    return z / (1.0 + tl.exp(-z))


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == IDENTITY:
        return tl.full(z.shape, 1.0, tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def channels_of(
    tile,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CH: tl.constexpr,
    SEGMENTS: tl.constexpr = 1,
):
    """Channel tile number `tile` over all samples: sample, first channel, channels of its rows.

    And which of these exist.
    """
    SPAN: tl.constexpr = GROUPS * GROUP_CHANNELS
    PARTS: tl.constexpr = (SPAN + CH - 1) // CH
    TILES: tl.constexpr = CHANNELS // SPAN * PARTS
    i_b = tile // TILES
    i_tile = tile - i_b * TILES
    i_part = i_tile % PARTS
    first = i_tile // PARTS * SPAN + i_part * CH
    i_local = tl.arange(0, SEGMENTS * CH)
    if SEGMENTS > 1:
        i_local %= CH
    return i_b, first, first + i_local, i_local + i_part * CH < SPAN


@triton.jit
def split_program(chunks, CHANNELS_LAST: tl.constexpr):
    """The channel tile and the chunk of pixels of this program.

    Neighbours in memory are neighbours in the grid: they share lines of the L2 cache.
    """
    program = tl.program_id(0).to(tl.int64)
    if CHANNELS_LAST:
        tiles = tl.num_programs(0) // chunks
        chunk = program // tiles
        tile = program - chunk * tiles
    else:
        tile = program // chunks
        chunk = program - tile * chunks
    return tile, chunk


@triton.jit
def tile_offsets(
    i_b,
    first,
    first_pixel,
    m_c,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CH: tl.constexpr,
    PIX: tl.constexpr,
    SEGMENTS: tl.constexpr = 1,
    PIECES: tl.constexpr = 1,
):
    """Where a tile lies: its first element, the others relative to it, and which exist.

    A piece of a tile has a PIECES-th of its pixels.
    """
    c = tl.arange(0, SEGMENTS * CH)[:, None]
    p = tl.arange(0, PIX // PIECES)[None, :]
    if SEGMENTS > 1:
        p += c // CH * PIX
        c %= CH
    if CHANNELS_LAST:
        base = (i_b * pixels + first_pixel) * CHANNELS + first
        offsets = p.to(tl.int64) * CHANNELS + c
    else:
        base = (i_b * CHANNELS + first) * pixels + first_pixel
        offsets = c.to(tl.int64) * pixels + p
    return base, offsets, m_c[:, None] & (first_pixel + p < pixels)


@triton.jit
def load_tile(p_x, offsets, mask):
    return tl.load(p_x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_channels(p, i_b, row_stride, i_c, m_c, NEUTRAL: tl.constexpr):
    """A small operand's values for the channels of a tile, NEUTRAL where it is absent."""
    if p is not None:
        values = tl.load(p + i_b * row_stride + i_c, mask=m_c, other=NEUTRAL).to(tl.float32)
    else:
        values = tl.full(i_c.shape, NEUTRAL, tl.float32)
    return values


@triton.jit
def load_groups(p, i_b, i_c, m_c, CHANNELS: tl.constexpr, GROUP_CHANNELS: tl.constexpr):
    """A (B, G) float32 array's values for the channels of a tile."""
    i_g = i_b * (CHANNELS // GROUP_CHANNELS) + i_c // GROUP_CHANNELS
    return tl.load(p + i_g, mask=m_c, other=0.0)


@triton.jit
def affine(
    weight,
    bias,
    scale,
    scale_stride,
    shift,
    shift_stride,
    i_b,
    i_c,
    m_c,
):
    """gamma and beta of z = gamma h_hat + beta."""
    b_scale = 1.0 + load_channels(scale, i_b, scale_stride, i_c, m_c, 0.0)
    gamma = load_channels(weight, 0, 0, i_c, m_c, 1.0) * b_scale
    beta = load_channels(bias, 0, 0, i_c, m_c, 0.0) * b_scale
    return gamma, beta + load_channels(shift, i_b, shift_stride, i_c, m_c, 0.0)


@triton.jit
def members(
    first,
    i_c,
    m_c,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SEGMENTS: tl.constexpr = 1,
):
    """The groups of the span that a tile begins in, and which row of the tile is in which.

    At least as many as the blocks of a cluster: the compiler cannot give them less than one each.
    """
    NUMBER: tl.constexpr = SEGMENTS if SEGMENTS > GROUPS else triton.next_power_of_2(GROUPS)
    i_g = first // GROUP_CHANNELS + tl.arange(0, NUMBER)
    m_member = (i_g[:, None] == (i_c // GROUP_CHANNELS)[None, :]) & m_c[None, :]
    return i_g, tl.arange(0, NUMBER) < GROUPS, m_member


@triton.jit
def first_elements(
    x,
    channel_bias,
    channel_bias_stride,
    i_b,
    i_g,
    mask,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The first element of each group i_g, and its channel's bias.

    Sums are taken relative to it, so that the mean of equal values is that value, not rounded.
    """
    i_c = i_g * GROUP_CHANNELS
    i = i_b * CHANNELS * pixels + i_c * (1 if CHANNELS_LAST else pixels)
    b_x = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    return b_x, load_channels(channel_bias, i_b, channel_bias_stride, i_c, mask, 0.0)


@triton.jit
def masked(product, m_tile):
    """A product that will be summed, 0 outside of the tile.

    The select is needed inside too: the product would be fused with the first addition between
    lanes, every lane would round the sum in its own way, and which one counts would be a race.
    """
    return tl.where(m_tile, product, 0.0)


@triton.jit
def sum_products(a, b, m_tile):
    """Sums of a b over the pixels of a tile: see `masked`."""
    return tl.sum(masked(a * b, m_tile), axis=1)


@triton.jit
def sum_groups(b_c, m_member):
    """Sums of the rows' values over the rows of each group."""
    return tl.sum(tl.where(m_member, b_c[None, :], 0.0), axis=1)


@triton.jit
def spread(b_g, m_member):
    """Per-group values, for every row."""
    return tl.sum(tl.where(m_member, b_g[:, None], 0.0), axis=0)


@triton.jit
def sum_segments(b_r, first, i_c, m_c, CH: tl.constexpr, SEGMENTS: tl.constexpr):
    """For every row the sum over all rows of its channel."""
    if SEGMENTS > 1:
        _, _, m_channel = members(first, i_c, m_c, 1, CH, SEGMENTS)
        b_r = spread(sum_groups(b_r, m_channel), m_channel)
    return b_r


@triton.jit
def store_if_wanted(p, i, value, mask):
    if p is not None:
        tl.store(p + i, value.to(p.dtype.element_ty), mask=mask)


def row_stride(operand: Tensor | None) -> int:
    return 0 if operand is None else operand.stride(0)


def workspace(like: Tensor, size: int) -> Tensor:
    return torch.empty((max(size, 1),), dtype=torch.float32, device=like.device)
