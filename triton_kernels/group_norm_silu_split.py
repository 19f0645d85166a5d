"""group_norm_silu for groups too large to be held: x is read twice, and so is grad.

Forward: moments of each part of a group, their merge, then y. Backward: sums over each chunk of
pixels, their merge, then dx. And the sum of the gradients of weight and bias over the batch, which
the one-pass kernel needs too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group_norm_silu_dropout import Mask, dropped, keep_scale
from .group_norm_silu_tiles import (
    Sums,
    activate,
    affine,
    input_gradient,
    load_channel_bias,
    load_groups,
    load_statistics,
    load_tile,
    masked,
    members_of,
    normalized,
    pivots,
    rounded_sum,
    rows_of,
    split_program,
    spread,
    store_channel_gradients,
    store_if_wanted,
    sum_groups,
    sum_products,
    tile_offsets,
)
from .philox import noise_key

# Loops say `disable_licm`: moved out of them, offsets and masks take 128 registers in place of 80.


@triton.jit
def tile_moments(values, n, mask, member):
    """Of each group the mean of its n elements in the tile, the sum of squares of the deviations.

    values: 0 outside of the tile.
    """
    mean = sum_groups(tl.sum(values, axis=1), member) / tl.maximum(n, 1.0)
    deviation = values - spread(mean, member)[:, None]
    return mean, sum_groups(sum_products(deviation, deviation, mask), member)


@triton.jit(do_not_specialize=["chunks", "rounds"])
def group_norm_silu_fwd_moments_kernel(
    numbers, means, squares, x, operands, residual, pixels, chunks, rounds, TILING: tl.constexpr
):
    """Moments of each group over one tile of channels and one chunk of pixels, `rounds` tiles.

    With a residual, of the sums, which are written.
    """
    CH: tl.constexpr = TILING.tile_channels
    PIX: tl.constexpr = TILING.tile_pixels
    PARTS: tl.constexpr = (TILING.groups * TILING.group_channels + CH - 1) // CH
    tile, chunk = split_program(chunks, TILING)
    rows = rows_of(tile, TILING)
    group, group_mask, member = members_of(rows, TILING)
    channel_bias = load_channel_bias(operands, rows)
    pivot, first, first_bias = pivots(
        x, residual, operands, channel_bias, rows, group, group_mask, member, pixels, TILING
    )

    channels = sum_groups(rows.mask.to(tl.float32), member)  # in the tile
    n = tl.zeros(group.shape, tl.float32)
    mean = tl.zeros(group.shape, tl.float32)
    square = tl.zeros(group.shape, tl.float32)
    for r in range(rounds):
        first_pixel = (chunk * rounds + r) * PIX
        base, offsets, mask = tile_offsets(rows, first_pixel, pixels, TILING)
        x_tile = tl.load(x + base + offsets, mask=mask, other=0.0)
        if residual is not None:
            other = tl.load(residual.x + base + offsets, mask=mask, other=0.0)
            x_tile = rounded_sum(x_tile, other, residual, rows)
            tl.store(residual.sum + base + offsets, x_tile, mask=mask)
        deviation = masked(x_tile.to(tl.float32) - pivot[:, None], mask)
        tile_n = channels * tl.minimum(tl.maximum(pixels - first_pixel, 0), PIX).to(tl.float32)
        tile_mean, tile_square = tile_moments(deviation, tile_n, mask, member)
        # Chan, Golub & LeVeque 1979: the moments of a union.
        together = tl.maximum(n + tile_n, 1.0)
        d = tile_mean - mean
        mean += d * (tile_n / together)
        square += tile_square + d * d * (n * tile_n / together)
        n += tile_n

    at = (rows.sample * chunks + chunk) * PARTS + tile % PARTS
    at = at * (TILING.channels // TILING.group_channels) + group
    tl.store(numbers + at, n, mask=group_mask)
    tl.store(means + at, mean + (first + first_bias), mask=group_mask)
    tl.store(squares + at, square, mask=group_mask)


@triton.jit(do_not_specialize=["groups", "parts", "eps"])
def group_norm_silu_fwd_merge_kernel(
    mean,
    rstd,
    numbers,
    means,
    squares,
    groups,
    parts,
    eps,
    NUM_GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """mean and rstd of some groups from the moments of their parts: means first, then deviations.

    `groups`: of all samples. The groups of a part lie side by side.
    """
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    group_mask = group < groups
    group_of_sample = group % NUM_GROUPS
    first = (group - group_of_sample) * parts + group_of_sample
    n = tl.zeros((BLOCK, TILE), tl.float32)
    total = tl.zeros((BLOCK, TILE), tl.float32)
    # Relative to one of the means, so that no digits of a large one are lost.
    pivot = tl.load(means + first, mask=group_mask, other=0.0)
    for k in range(0, parts, BLOCK):
        part = k + tl.arange(0, BLOCK)[:, None]
        mask = (part < parts) & group_mask[None, :]
        at = part * NUM_GROUPS + first[None, :]
        part_n = tl.load(numbers + at, mask=mask, other=0.0)
        part_mean = tl.load(means + at, mask=mask, other=0.0)
        n += part_n
        total += masked(part_n * (part_mean - pivot[None, :]), mask)
    number = tl.maximum(tl.sum(n, axis=0), 1.0)
    group_mean = pivot + tl.sum(total, axis=0) / number
    square = tl.zeros((BLOCK, TILE), tl.float32)
    for k in range(0, parts, BLOCK):
        part = k + tl.arange(0, BLOCK)[:, None]
        mask = (part < parts) & group_mask[None, :]
        at = part * NUM_GROUPS + first[None, :]
        part_n = tl.load(numbers + at, mask=mask, other=0.0)
        d = tl.load(means + at, mask=mask, other=0.0) - group_mean[None, :]
        square += tl.load(squares + at, mask=mask, other=0.0) + masked(part_n * d * d, mask)
    tl.store(mean + group, group_mean, mask=group_mask)
    group_rstd = 1.0 / tl.sqrt(tl.sum(square, axis=0) / number + eps)
    tl.store(rstd + group, group_rstd, mask=group_mask)


@triton.jit(do_not_specialize=["seed", "stream", "threshold", "chunks", "rounds"])
def group_norm_silu_fwd_apply_kernel(
    y,
    mean,
    rstd,
    x,
    operands,
    keys,
    seed,
    stream,
    threshold,
    pixels,
    chunks,
    rounds,
    ACTIVATION: tl.constexpr,
    TILING: tl.constexpr,
):
    """y of a tile of channels and a chunk of pixels, `rounds` tiles, with the moments known."""
    PIX: tl.constexpr = TILING.tile_pixels
    tile, chunk = split_program(chunks, TILING)
    rows = rows_of(tile, TILING)
    center, row_rstd = load_statistics(mean, rstd, x, operands, rows, pixels, TILING)
    gamma, beta = affine(operands, rows)
    slope = row_rstd * gamma
    if threshold is not None:
        dropout = Mask(noise_key(keys, seed, rows.sample), stream, threshold)

    for r in tl.range(rounds, disable_licm=True):
        first_pixel = (chunk * rounds + r) * PIX
        base, offsets, mask = tile_offsets(rows, first_pixel, pixels, TILING)
        x_tile = load_tile(x + base, offsets, mask)
        z = (x_tile - center[:, None]) * slope[:, None] + beta[:, None]
        values = activate(z, ACTIVATION)
        if threshold is not None:
            values *= keep_scale(threshold)
            values = dropped(values, dropout, rows, first_pixel, pixels, TILING)
        tl.store(y + base + offsets, values.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "stream", "threshold", "chunks", "rounds"])
def group_norm_silu_bwd_sums_kernel(
    sums,
    grad,
    x,
    mean,
    rstd,
    operands,
    keys,
    seed,
    stream,
    threshold,
    pixels,
    chunks,
    rounds,
    ACTIVATION: tl.constexpr,
    TILING: tl.constexpr,
):
    """s0, s1 and s2 of one tile of channels over one chunk of pixels, `rounds` tiles."""
    CH: tl.constexpr = TILING.tile_channels
    PIX: tl.constexpr = TILING.tile_pixels
    tile, chunk = split_program(chunks, TILING)
    rows = rows_of(tile, TILING)
    center, row_rstd = load_statistics(mean, rstd, x, operands, rows, pixels, TILING)
    gamma, beta = affine(operands, rows)

    s0 = tl.zeros((CH,), tl.float32)
    s1 = tl.zeros((CH,), tl.float32)
    s2 = tl.zeros((CH,), tl.float32)
    if threshold is not None:
        dropout = Mask(noise_key(keys, seed, rows.sample), stream, threshold)
    for r in tl.range(rounds, disable_licm=True):
        first_pixel = (chunk * rounds + r) * PIX
        base, offsets, mask = tile_offsets(rows, first_pixel, pixels, TILING)
        x_tile = load_tile(x + base, offsets, mask)
        grad_tile = load_tile(grad + base, offsets, mask)
        if threshold is not None:
            grad_tile *= keep_scale(threshold)
            grad_tile = dropped(grad_tile, dropout, rows, first_pixel, pixels, TILING)
        h_hat, dz = normalized(x_tile, grad_tile, mask, center, row_rstd, gamma, beta, ACTIVATION)
        s0 += tl.sum(dz, axis=1)
        s1 += sum_products(dz, h_hat, mask)
        if sums.s2 is not None:
            s2 += tl.sum(h_hat, axis=1)
    at = (tile * chunks + chunk) * CH + tl.arange(0, CH)  # a program's side by side
    tl.store(sums.s0 + at, s0, mask=rows.mask)
    tl.store(sums.s1 + at, s1, mask=rows.mask)
    store_if_wanted(sums.s2, at, s2, rows.mask)


@triton.jit
def add_chunks(
    pointer,
    rows,
    chunks,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    CH: tl.constexpr,
):
    """Sums over the chunks of every channel, of which a program had TILE, or a span."""
    CHUNKS: tl.constexpr = 16
    PARTS: tl.constexpr = (SPAN + TILE - 1) // TILE
    channel_of_span = rows.channel % SPAN
    span = rows.sample * (CHANNELS // SPAN) + rows.channel // SPAN
    tile = span * PARTS + channel_of_span // TILE
    total = tl.zeros((CH, CHUNKS), tl.float32)
    for k in range(0, chunks, CHUNKS):
        chunk = k + tl.arange(0, CHUNKS)[None, :]
        at = (tile[:, None] * chunks + chunk) * TILE + (channel_of_span % TILE)[:, None]
        total += tl.load(pointer + at, mask=rows.mask[:, None] & (chunk < chunks), other=0.0)
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["chunks"])
def group_norm_silu_bwd_finish_kernel(
    means0,
    means1,
    gradients,
    sums,
    rstd,
    operands,
    pixels,
    chunks,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    TILING: tl.constexpr,
):
    """m0 and m1 of one group of one sample, and the gradients of its small operands.

    The group is a span of TILING, cut into parts. The sums are those of spans of SPAN channels,
    TILE of which a program had.
    """
    CHANNELS: tl.constexpr = TILING.channels
    CH: tl.constexpr = TILING.tile_channels
    PARTS: tl.constexpr = (TILING.group_channels + CH - 1) // CH
    group = tl.program_id(0).to(tl.int64)
    total0 = tl.zeros((CH,), tl.float32)
    total1 = tl.zeros((CH,), tl.float32)
    for part in range(PARTS):
        rows = rows_of(group * PARTS + part, TILING)
        gamma, _ = affine(operands, rows)
        total0 += gamma * add_chunks(sums.s0, rows, chunks, CHANNELS, SPAN, TILE, CH)
        total1 += gamma * add_chunks(sums.s1, rows, chunks, CHANNELS, SPAN, TILE, CH)
    scaling = 1.0 / (TILING.group_channels * 1.0 * pixels)
    m0 = tl.sum(total0, axis=0) * scaling
    m1 = tl.sum(total1, axis=0) * scaling
    tl.store(means0 + group, m0)
    tl.store(means1 + group, m1)
    group_rstd = tl.load(rstd + group)
    for part in range(PARTS):
        rows = rows_of(group * PARTS + part, TILING)
        gamma, _ = affine(operands, rows)
        s0 = add_chunks(sums.s0, rows, chunks, CHANNELS, SPAN, TILE, CH)
        s1 = add_chunks(sums.s1, rows, chunks, CHANNELS, SPAN, TILE, CH)
        s2 = s0
        if sums.s2 is not None:
            s2 = add_chunks(sums.s2, rows, chunks, CHANNELS, SPAN, TILE, CH)
        totals = Sums(s0, s1, s2)
        weight_share, bias_share = store_channel_gradients(
            gradients, operands, totals, m0, m1, group_rstd, gamma, pixels, rows, CHANNELS
        )
        at = rows.sample * CHANNELS + rows.channel
        store_if_wanted(gradients.weight, at, weight_share, rows.mask)
        store_if_wanted(gradients.bias, at, bias_share, rows.mask)


@triton.jit(do_not_specialize=["seed", "stream", "threshold", "chunks", "rounds"])
def group_norm_silu_bwd_apply_kernel(
    grad_x,
    sum_bias_parts,
    means0,
    means1,
    grad,
    x,
    mean,
    rstd,
    operands,
    grad_sum,
    keys,
    seed,
    stream,
    threshold,
    pixels,
    chunks,
    rounds,
    ACTIVATION: tl.constexpr,
    TILING: tl.constexpr,
):
    """dx of a tile of channels and a chunk of pixels, `rounds` tiles, with m0 and m1 known.

    And where wanted its sums over the chunk, for the gradient of a sum's bias.
    """
    PIX: tl.constexpr = TILING.tile_pixels
    tile, chunk = split_program(chunks, TILING)
    rows = rows_of(tile, TILING)
    center, row_rstd = load_statistics(mean, rstd, x, operands, rows, pixels, TILING)
    m0 = load_groups(means0, rows, TILING)
    m1 = load_groups(means1, rows, TILING)
    gamma, beta = affine(operands, rows)
    dx_sums = tl.zeros((TILING.tile_channels,), tl.float32)
    if threshold is not None:
        dropout = Mask(noise_key(keys, seed, rows.sample), stream, threshold)
    for r in tl.range(rounds, disable_licm=True):
        first_pixel = (chunk * rounds + r) * PIX
        base, offsets, mask = tile_offsets(rows, first_pixel, pixels, TILING)
        x_tile = load_tile(x + base, offsets, mask)
        grad_tile = load_tile(grad + base, offsets, mask)
        if threshold is not None:
            grad_tile *= keep_scale(threshold)
            grad_tile = dropped(grad_tile, dropout, rows, first_pixel, pixels, TILING)
        h_hat, dz = normalized(x_tile, grad_tile, mask, center, row_rstd, gamma, beta, ACTIVATION)
        dx = input_gradient(h_hat, dz, m0, m1, row_rstd, gamma)
        if grad_sum is not None:
            dx += load_tile(grad_sum + base, offsets, mask)
        tl.store(grad_x + base + offsets, dx.to(grad_x.dtype.element_ty), mask=mask)
        if sum_bias_parts is not None:
            dx_sums += tl.sum(tl.where(mask, dx, 0.0), axis=1)
    at = (rows.sample * chunks + chunk) * TILING.channels + rows.channel
    store_if_wanted(sum_bias_parts, at, dx_sums, rows.mask)


@triton.jit(do_not_specialize=["rows"])
def group_norm_silu_bwd_rows_kernel(
    totals, shares, rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, CH: tl.constexpr
):
    """The sums over each `rows` rows of CHANNELS shares, always in the same order.

    A program has some channels of the totals of weight, bias and sum_bias, as far as they are
    wanted.
    """
    BLOCKS: tl.constexpr = (CHANNELS + CH - 1) // CH
    program = tl.program_id(0).to(tl.int64)
    result = program // BLOCKS
    channel = (program - result * BLOCKS) * CH + tl.arange(0, CH)
    channel_mask = channel < CHANNELS
    weight_sums = tl.zeros((ROWS, CH), tl.float32)
    bias_sums = tl.zeros((ROWS, CH), tl.float32)
    sum_bias_sums = tl.zeros((ROWS, CH), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        at = (result * rows + row)[:, None] * CHANNELS + channel[None, :]
        mask = (row < rows)[:, None] & channel_mask[None, :]
        if totals.weight is not None:
            weight_sums += tl.load(shares.weight + at, mask=mask, other=0.0)
        if totals.bias is not None:
            bias_sums += tl.load(shares.bias + at, mask=mask, other=0.0)
        if totals.sum_bias is not None:
            sum_bias_sums += tl.load(shares.sum_bias + at, mask=mask, other=0.0)
    at = result * CHANNELS + channel
    store_if_wanted(totals.weight, at, tl.sum(weight_sums, axis=0), channel_mask)
    store_if_wanted(totals.bias, at, tl.sum(bias_sums, axis=0), channel_mask)
    store_if_wanted(totals.sum_bias, at, tl.sum(sum_bias_sums, axis=0), channel_mask)
