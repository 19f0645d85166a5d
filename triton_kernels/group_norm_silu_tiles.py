"""What the kernels of group_norm_silu share: tiles, operands and formulas.

A tile is [channels, pixels] of one sample in both memory formats. Which of the two is contiguous is
only visible in the offsets, from which the compiler finds 16-byte accesses. The channels of a tile
belong to a span: `groups` whole groups. A span of more than `tile_channels` channels is cut.

A tile of a cluster is [rows, pixels]: the channels of a first segment of pixels, then those of a
second, and so on, because the compiler gives each block of the cluster the same number of rows. If
the rows were channels, they would be too few for 16 bytes in channels_last, and Triton 3.8 fails to
compile fewer rows than blocks.

The backward pass has, with dz = grad act'(z) and, per channel of a sample, s0 = sum dz,
s1 = sum dz h_hat, s2 = sum h_hat over its pixels, and per group of N elements, with
gamma = weight (1 + scale), m0 = sum gamma s0 / N, m1 = sum gamma s1 / N:

    dx = rstd (gamma dz - m0 - h_hat m1)       dchannel_bias = rstd (gamma s0 - pixels m0 - s2 m1)
    dshift = s0                                dscale = weight s1 + bias s0
    dbias = sum over samples of (1 + scale) s0
    dweight = sum over samples of (1 + scale) s1
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU, IDENTITY = (tl.constexpr(k) for k in range(2))


class Tiling(NamedTuple):
    """How samples are cut into tiles: what the kernels know at compile time.

    To Triton 3.6 its members are plain numbers. Where Triton asks for a constant, as in
    `tl.static_range`, they need a name first: `PIECES: tl.constexpr = TILING.pieces`.
    """

    channels: int  # of a sample
    group_channels: int
    groups: int  # whole groups in a span of channels
    tile_channels: int  # a power of two
    tile_pixels: int = 1  # a power of two; of one block
    channels_last: bool = False
    segments: int = 1  # of pixels, one for each block of a cluster
    pieces: int = 1  # that a held tile is cut into
    packed: bool = False  # elements of 16 bits are held in pairs

    def as_held(self) -> Tiling:
        """The same tiles in units of what is held: pairs of neighbours in memory if `packed`."""
        if not self.packed:
            return self
        if not self.channels_last:
            return self._replace(tile_pixels=self.tile_pixels // 2)
        return self._replace(
            channels=self.channels // 2,
            group_channels=self.group_channels // 2,
            tile_channels=self.tile_channels // 2,
        )


class Operands(NamedTuple):
    """The small operands, each of which may be absent, and the distance between their samples."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    channel_bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    channel_bias_stride: int | None = None
    scale_stride: int | None = None
    shift_stride: int | None = None


class Residual(NamedTuple):
    """What is added to x, and where the sum goes, which takes the place of x."""

    x: Tensor
    bias: Tensor | None  # (C,)
    sum: Tensor


class Gradients(NamedTuple):
    """Of the small operands, None where not wanted; or shares in those that sum over the batch."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    sum_bias: Tensor | None = None
    channel_bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class Sums(NamedTuple):
    """s0, s1 and s2 of the formulas above: pointers to them, or values."""

    s0: Tensor
    s1: Tensor
    s2: Tensor | None


class Rows(NamedTuple):
    """The rows of a tile."""

    sample: tl.tensor
    first: tl.tensor  # channel of the tile
    channel: tl.tensor  # of each row
    mask: tl.tensor  # rows that exist


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
def rows_of(tile, TILING: tl.constexpr):
    """The rows of tile number `tile`, counted over all samples."""
    CH: tl.constexpr = TILING.tile_channels
    SPAN: tl.constexpr = TILING.groups * TILING.group_channels
    PARTS: tl.constexpr = (SPAN + CH - 1) // CH
    TILES: tl.constexpr = TILING.channels // SPAN * PARTS
    sample = tile // TILES
    tile_of_sample = tile - sample * TILES
    part = tile_of_sample % PARTS
    first = tile_of_sample // PARTS * SPAN + part * CH
    row = tl.arange(0, TILING.segments * CH)
    if TILING.segments > 1:
        row %= CH
    return Rows(sample, first, first + row, row + part * CH < SPAN)


@triton.jit
def split_program(chunks, TILING: tl.constexpr):
    """The tile and the chunk of pixels of this program.

    Neighbours in memory are neighbours in the grid: they share lines of the L2 cache.
    """
    program = tl.program_id(0).to(tl.int64)
    if TILING.channels_last:
        tiles = tl.num_programs(0) // chunks
        chunk = program // tiles
        tile = program - chunk * tiles
    else:
        tile = program // chunks
        chunk = program - tile * chunks
    return tile, chunk


@triton.jit
def tile_offsets(rows, first_pixel, pixels, TILING: tl.constexpr):
    """Where a tile, or a piece of one, lies.

    Its first element, the others relative to it, and which of them exist.
    """
    CH: tl.constexpr = TILING.tile_channels
    c = tl.arange(0, TILING.segments * CH)[:, None]
    p = tl.arange(0, TILING.tile_pixels // TILING.pieces)[None, :]
    if TILING.segments > 1:
        p += c // CH * TILING.tile_pixels
        c %= CH
    if TILING.channels_last:
        base = (rows.sample * pixels + first_pixel) * TILING.channels + rows.first
        offsets = p.to(tl.int64) * TILING.channels + c
    else:
        base = (rows.sample * TILING.channels + rows.first) * pixels + first_pixel
        offsets = c.to(tl.int64) * pixels + p
    return base, offsets, rows.mask[:, None] & (first_pixel + p < pixels)


@triton.jit
def load_tile(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_channels(pointer, stride, rows, NEUTRAL: tl.constexpr):
    """A small operand's value for every row, NEUTRAL where the operand is absent."""
    if pointer is not None:
        row = pointer + rows.sample * stride
        values = tl.load(row + rows.channel, mask=rows.mask, other=NEUTRAL).to(tl.float32)
    else:
        values = tl.full(rows.channel.shape, NEUTRAL, tl.float32)
    return values


@triton.jit
def load_channel_bias(operands, rows):
    return load_channels(operands.channel_bias, operands.channel_bias_stride, rows, 0.0)


@triton.jit
def load_groups(pointer, rows, TILING: tl.constexpr):
    """The value of a (B, G) float32 array for every row."""
    GROUPS: tl.constexpr = TILING.channels // TILING.group_channels
    at = rows.sample * GROUPS + rows.channel // TILING.group_channels
    return tl.load(pointer + at, mask=rows.mask, other=0.0)


@triton.jit
def affine(operands, rows):
    """gamma and beta of z = gamma h_hat + beta."""
    scale = 1.0 + load_channels(operands.scale, operands.scale_stride, rows, 0.0)
    gamma = load_channels(operands.weight, 0, rows, 1.0) * scale
    beta = load_channels(operands.bias, 0, rows, 0.0) * scale
    return gamma, beta + load_channels(operands.shift, operands.shift_stride, rows, 0.0)


@triton.jit
def members(rows, GROUP_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SEGMENTS: tl.constexpr):
    """The groups of the span that a tile begins in, which of them exist, which row is in which.

    At least as many as the blocks of a cluster: the compiler cannot give them less than one each.
    """
    NUMBER: tl.constexpr = SEGMENTS if SEGMENTS > GROUPS else triton.next_power_of_2(GROUPS)
    group = rows.first // GROUP_CHANNELS + tl.arange(0, NUMBER)
    member = (group[:, None] == (rows.channel // GROUP_CHANNELS)[None, :]) & rows.mask[None, :]
    return group, tl.arange(0, NUMBER) < GROUPS, member


@triton.jit
def members_of(rows, TILING: tl.constexpr):
    return members(rows, TILING.group_channels, TILING.groups, TILING.segments)


@triton.jit
def rounded_sum(x, other, residual, rows):
    """(x + other) + bias, as it is stored, of a tile or (1-D) of one element of each row."""
    total = x.to(tl.float32) + other.to(tl.float32)
    if residual.bias is not None:
        bias = load_channels(residual.bias, 0, rows, 0.0)
        total += bias if len(x.shape) == 1 else bias[:, None]
    return total.to(x.dtype)


@triton.jit
def load_first(x, residual, rows, pixels, TILING: tl.constexpr):
    """The first element of each channel of `rows`."""
    step = 1 if TILING.channels_last else pixels
    at = rows.sample * TILING.channels * pixels + rows.channel * step
    first = tl.load(x + at, mask=rows.mask, other=0.0)
    if residual is not None:
        other = tl.load(residual.x + at, mask=rows.mask, other=0.0)
        first = rounded_sum(first, other, residual, rows)
    return first.to(tl.float32)


@triton.jit
def pivots(
    x,
    residual,
    operands,
    channel_bias,
    rows,
    group,
    group_mask,
    member,
    pixels,
    TILING: tl.constexpr,
):
    """What sums subtract from x, for every row; the first element of each group, and its bias.

    Sums are relative to a group's first element, so that the mean of equal values is that value,
    not rounded.
    """
    first_rows = Rows(rows.sample, rows.first, group * TILING.group_channels, group_mask)
    first = load_first(x, residual, first_rows, pixels, TILING)
    first_bias = load_channel_bias(operands, first_rows)
    pivot = spread(first, member)
    if operands.channel_bias is not None:
        pivot += spread(first_bias, member) - channel_bias
    return pivot, first, first_bias


@triton.jit
def masked(product, mask):
    """A product that will be summed, 0 outside of the tile.

    The select is needed although both factors are 0 there. Without it the compiler fuses the
    product with the first addition between lanes; each lane then rounds the sum in its own way, and
    which of them is stored would be a race.
    """
    return tl.where(mask, product, 0.0)


@triton.jit
def sum_products(a, b, mask):
    """Sums of a b over the pixels of a tile: see `masked`."""
    return tl.sum(masked(a * b, mask), axis=1)


@triton.jit
def sum_groups(row_values, member):
    """Sums of the rows' values over the rows of each group."""
    return tl.sum(tl.where(member, row_values[None, :], 0.0), axis=1)


@triton.jit
def spread(group_values, member):
    """Per-group values, for every row."""
    return tl.sum(tl.where(member, group_values[:, None], 0.0), axis=0)


@triton.jit
def sum_segments(row_values, rows, TILING: tl.constexpr):
    """For every row the sum over all rows of its channel."""
    if TILING.segments > 1:
        _, _, member = members(rows, 1, TILING.tile_channels, TILING.segments)
        row_values = spread(sum_groups(row_values, member), member)
    return row_values


@triton.jit
def store_if_wanted(pointer, offsets, value, mask):
    if pointer is not None:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_statistics(mean, rstd, x, operands, rows, pixels, TILING: tl.constexpr):
    """center and rstd of h_hat = (x - center) rstd, for every row.

    The mean has the channel bias in it and was rounded once. Any value that rounds to it with the
    bias of the group's first channel may be the center of that channel; where the first element
    does, it is the one that is exact in constant groups.
    """
    center = load_groups(mean, rows, TILING)
    if operands.channel_bias is not None:
        channel = rows.channel - rows.channel % TILING.group_channels
        first_rows = Rows(rows.sample, rows.first, channel, rows.mask)
        first = load_first(x, None, first_rows, pixels, TILING)
        first_bias = load_channel_bias(operands, first_rows)
        center = tl.where(first + first_bias == center, first, center - first_bias)
        center -= load_channel_bias(operands, rows) - first_bias
    return center, load_groups(rstd, rows, TILING)


@triton.jit
def normalized(x, grad, mask, center, rstd, gamma, beta, ACTIVATION: tl.constexpr):
    """h_hat and dz of a tile of x and grad, 0 outside of it."""
    h_hat = masked((x - center[:, None]) * rstd[:, None], mask)
    z = h_hat * gamma[:, None] + beta[:, None]
    return h_hat, masked(grad * activation_slope(z, ACTIVATION), mask)


@triton.jit
def input_gradient(h_hat, dz, m0, m1, rstd, gamma):
    slope, m0, m1 = rstd * gamma, rstd * m0, rstd * m1
    return slope[:, None] * dz - m0[:, None] - m1[:, None] * h_hat


@triton.jit
def store_channel_gradients(
    gradients, operands, sums, m0, m1, rstd, gamma, pixels, rows, CHANNELS: tl.constexpr
):
    """Store the gradients of the small operands that need no sum over the batch.

    Returns this sample's shares in the others, those of weight and bias.
    """
    at = rows.sample * CHANNELS + rows.channel
    weight = load_channels(operands.weight, 0, rows, 1.0)
    bias = load_channels(operands.bias, 0, rows, 0.0)
    by_scale = weight * sums.s1 + bias * sums.s0
    store_if_wanted(gradients.scale, at, by_scale, rows.mask)
    store_if_wanted(gradients.shift, at, sums.s0, rows.mask)
    by_channel_bias = rstd * (gamma * sums.s0 - pixels * m0 - sums.s2 * m1)
    store_if_wanted(gradients.channel_bias, at, by_channel_bias, rows.mask)
    scale = 1.0 + load_channels(operands.scale, operands.scale_stride, rows, 0.0)
    return scale * sums.s1, scale * sums.s0


def row_stride(operand: Tensor | None) -> int:
    return 0 if operand is None else operand.stride(0)


def workspace(like: Tensor, size: int) -> Tensor:
    return torch.empty((max(size, 1),), dtype=torch.float32, device=like.device)
