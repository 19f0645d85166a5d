"""What the forward and backward kernels of group_norm_silu share: tiles, operands, formulas, plans.

A tile is [channels, pixels] of one sample in both memory formats; which of the two is contiguous is
left to the offsets, from which the compiler finds 16-byte accesses. Its channels belong to a span:
GROUPS whole groups, GROUP_CHANNELS channels each. A span of more than CH channels is cut.

A tile that a cluster holds is [rows, pixels]: the channels of a first segment of pixels, those of a
second, and so on, as the compiler gives each block of the cluster as many rows. Were the rows
channels, they would be too few for 16 bytes in channels_last, and Triton 3.8 fails to compile fewer
rows than blocks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import DEVICE_PROGRAMS

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
):
    """Where a tile lies: its first element, the others relative to it, and which exist."""
    c = tl.arange(0, SEGMENTS * CH)[:, None]
    p = tl.arange(0, PIX)[None, :]
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


class Plan(NamedTuple):
    """How one sample is cut into tiles. Nothing here depends on the batch size: nor do results."""

    one_pass: bool  # a program holds whole groups in registers
    groups: int  # whole groups in a span of channels
    channels: int  # tile: powers of two
    pixels: int  # of a block
    rounds: int  # pixel tiles that a program of a reduction adds up
    num_warps: int  # of a block
    blocks: int = 1  # of a program: a cluster

    def parts(self, channels: int, num_groups: int) -> int:
        """Channel tiles that a span is cut into; more than one only if it is a single group."""
        return triton.cdiv(channels // num_groups * self.groups, self.channels)

    def channel_tiles(self, channels: int, num_groups: int) -> int:
        """Channel tiles of one sample."""
        return num_groups // self.groups * self.parts(channels, num_groups)

    def constants(self, channels: int, num_groups: int, channels_last: bool) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        constants = {
            "CHANNELS": channels,
            "GROUP_CHANNELS": channels // num_groups,
            "GROUPS": self.groups,
            "CHANNELS_LAST": channels_last,
            "CH": self.channels,
            "PIX": self.pixels,
            "num_warps": self.num_warps,
            "num_ctas": self.blocks,
        }
        return constants | ({"SEGMENTS": self.blocks} if self.one_pass else {})


# float32 values that a block can hold in the 65536 registers of a multiprocessor, next to
# addresses and small operands. With more it spills on sm_80, sm_90 or sm_100. So does what is two
# of these: float32, of which 16 bytes are few elements; channels_last; a cluster's backward pass.
HELD = 32768
HELD_WIDE = 16384
CLUSTER_CHANNELS = 128  # its kernels compare all channels with all rows, eight times as many
SECTOR_BYTES = 32
WARP_BYTES = 512  # that one access of a warp can have
SPLIT_ELEMENTS = 4096  # per tile: 16 bytes for each of 128 threads, 4 times (bfloat16) or 8 times
SPLIT_WIDTH_BYTES = 64  # channels_last: two sectors of adjacent channels; wide tiles are short, so
# that more of them would leave partial sums
REDUCTION_PROGRAMS = 512  # per sample: fills 132 multiprocessors at batch 1, and merges quickly
WASTE = 1.1  # sectors touched / needed


def _sector_waste(width: int) -> float:
    """Bytes of the sectors touched by rows of `width` bytes that begin at multiples of `width`."""
    starts = range(0, SECTOR_BYTES, math.gcd(width, SECTOR_BYTES))
    sectors = sum(triton.cdiv(start + width, SECTOR_BYTES) for start in starts) / len(starts)
    return sectors * SECTOR_BYTES / width


def plan(
    channels: int,
    num_groups: int,
    pixels: int,
    itemsize: int,
    channels_last: bool,
    arrays: int,
    max_blocks: int = 1,
) -> Plan:
    """The default choice for a sample, for a kernel that holds tiles of so many `arrays`.

    In the registers of one block, or of the smallest cluster of at most `max_blocks` that can or
    that wastes less of the sectors it reads; else in two passes.
    """
    group_channels = channels // num_groups
    divisors = [k for k in range(1, num_groups + 1) if num_groups % k == 0]

    def waste(groups: int) -> float:
        if not channels_last or groups == num_groups:  # what a tile reads is contiguous
            return 1.0
        return _sector_waste(groups * group_channels * itemsize)

    padded = triton.next_power_of_2(pixels)
    sizes = {k: triton.next_power_of_2(k * group_channels) * padded for k in divisors}
    limit = min(max_blocks, max(1, padded * itemsize // SECTOR_BYTES))
    choices = []
    for blocks in (1 << k for k in range(limit.bit_length())):
        crowded = channels_last + (itemsize > 2) + (blocks > 1 and arrays > 1) >= 2
        held = (HELD_WIDE if crowded else HELD) // arrays * blocks
        if blocks > 1:
            held = min(held, CLUSTER_CHANNELS * padded)  # elements
        fitting = [k for k in divisors if sizes[k] <= held]
        # The fewest groups, so the most programs, among those that waste nothing; else the least.
        # And enough for 16 bytes a thread.
        groups = min(
            fitting,
            key=lambda k: (max(waste(k), WASTE), sizes[k] * itemsize < WARP_BYTES, k),
            default=0,
        )
        # A second read costs half as much again.
        if groups and waste(groups) < 1.5:
            choices.append((max(waste(groups), WASTE), blocks, groups))
    if choices:
        _, blocks, groups = min(choices)
        # A cluster that is needed anyway may as well fill a device at batch 1.
        while 1 < blocks < limit and num_groups // groups * blocks < DEVICE_PROGRAMS:
            blocks *= 2
        tile, warps = sizes[groups] // padded, _warps(sizes[groups] // blocks)
        return Plan(True, groups, tile, padded // blocks, 1, warps, blocks)

    groups = 1
    if channels_last:
        wide = [k for k in divisors if k * group_channels * itemsize >= SPLIT_WIDTH_BYTES]
        narrow = [k for k in wide if k * group_channels <= SPLIT_ELEMENTS // 16] or divisors[:1]
        groups = min(narrow, key=lambda k: (max(waste(k), WASTE), k))
        tile = min(triton.next_power_of_2(groups * group_channels), SPLIT_ELEMENTS // 16)
        tile_pixels = min(padded, SPLIT_ELEMENTS // tile)
    else:
        tile_pixels = min(padded, SPLIT_ELEMENTS)
        tile = min(triton.next_power_of_2(group_channels), SPLIT_ELEMENTS // tile_pixels)
    tiles = triton.cdiv(pixels, tile_pixels) * triton.cdiv(channels, tile)
    rounds = max(1, triton.next_power_of_2(tiles // REDUCTION_PROGRAMS + 1) // 2)
    return Plan(False, groups, tile, tile_pixels, rounds, 4)


def samples_per_program(
    cut: Plan, batch: int, channels: int, num_groups: int, pixels: int, itemsize: int
) -> int:
    """Samples that a program of the backward pass handles one after the other.

    Its shares in the gradients of weight and bias are 16 bytes per channel, written and read: twice
    as many samples until that is a 24th of x, grad and grad_x, as long as they divide the batch and
    leave enough programs, to fill a device or of 4 KB; four at most, as their loop is unrolled.
    """
    samples, size = 1, pixels * itemsize
    enough = min(DEVICE_PROGRAMS, max(1, batch * channels * size >> 12))
    tiles = batch * cut.channel_tiles(channels, num_groups)
    while (
        cut.one_pass
        and samples < 4
        and samples * 3 * size < 24 * 16
        and batch % (2 * samples) == 0
        and tiles // (2 * samples) >= enough
    ):
        samples *= 2
    return samples


def _warps(elements: int) -> int:
    """16 elements a thread up to 16 warps. The largest tiles take 8 warps instead.

    The small operands occupy as many registers of every thread, so fewer threads have more to
    spare: 32768 elements spill with 16 warps.
    """
    return 8 if elements > 16384 else min(16, max(1, elements // 512))


def row_stride(operand: Tensor | None) -> int:
    return 0 if operand is None else operand.stride(0)


def workspace(like: Tensor, size: int) -> Tensor:
    return torch.empty((max(size, 1),), dtype=torch.float32, device=like.device)
