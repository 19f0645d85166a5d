"""group_norm_silu forward in two reads of x, of groups too large to be held."""

from __future__ import annotations

import triton
import triton.language as tl

from .group_norm_silu_tiles import (
    activate,
    affine,
    channels_of,
    first_elements,
    load_channels,
    load_groups,
    load_tile,
    masked,
    members,
    split_program,
    spread,
    sum_groups,
    sum_products,
    tile_offsets,
)


@triton.jit
def tile_moments(b_h, m_tile, m_member):
    """Of each group the elements in the tile, their mean, the sum of squares of the deviations.

    b_h: 0 outside of the tile.
    """
    n = sum_groups(tl.sum(m_tile.to(tl.float32), axis=1), m_member)
    mean = sum_groups(tl.sum(b_h, axis=1), m_member) / tl.maximum(n, 1.0)
    b_d = b_h - spread(mean, m_member)[:, None]
    return n, mean, sum_groups(sum_products(b_d, b_d, m_tile), m_member)


@triton.jit(do_not_specialize=["chunks", "rounds"])
def group_norm_silu_fwd_moments_kernel(
    numbers,
    means,
    squares,
    x,
    channel_bias,
    channel_bias_stride,
    pixels,
    chunks,
    rounds,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CH: tl.constexpr,
    PIX: tl.constexpr,
):
    """Moments of each group over one channel tile and one chunk of pixels, `rounds` tiles long."""
    PARTS: tl.constexpr = (GROUPS * GROUP_CHANNELS + CH - 1) // CH
    tile, chunk = split_program(chunks, CHANNELS_LAST)
    i_b, first, i_c, m_c = channels_of(tile, CHANNELS, GROUP_CHANNELS, GROUPS, CH)
    i_g, m_g, m_member = members(first, i_c, m_c, GROUP_CHANNELS, GROUPS)
    b_bias = load_channels(channel_bias, i_b, channel_bias_stride, i_c, m_c, 0.0)
    b_first, b_bias_first = first_elements(
        x,
        channel_bias,
        channel_bias_stride,
        i_b,
        i_g,
        m_g,
        pixels,
        CHANNELS,
        GROUP_CHANNELS,
        CHANNELS_LAST,
    )
    pivot = spread(b_first, m_member)
    if channel_bias is not None:
        pivot += spread(b_bias_first, m_member) - b_bias

    n = tl.zeros(i_g.shape, tl.float32)
    b_mean = tl.zeros(i_g.shape, tl.float32)
    square = tl.zeros(i_g.shape, tl.float32)
    for r in range(rounds):
        base, offsets, m_tile = tile_offsets(
            i_b,
            first,
            (chunk * rounds + r) * PIX,
            m_c,
            pixels,
            CHANNELS,
            CHANNELS_LAST,
            CH,
            PIX,
        )
        b_d = masked(load_tile(x + base, offsets, m_tile) - pivot[:, None], m_tile)
        n_tile, tile_mean, tile_square = tile_moments(b_d, m_tile, m_member)
        # Chan, Golub & LeVeque 1979: the moments of a union.
        together = tl.maximum(n + n_tile, 1.0)
        d = tile_mean - b_mean
        b_mean += d * (n_tile / together)
        square += tile_square + d * d * (n * n_tile / together)
        n += n_tile

    i_part = (i_b * chunks + chunk) * PARTS + tile % PARTS
    i_part = i_part * (CHANNELS // GROUP_CHANNELS) + i_g
    tl.store(numbers + i_part, n, mask=m_g)
    tl.store(means + i_part, b_mean + (b_first + b_bias_first), mask=m_g)
    tl.store(squares + i_part, square, mask=m_g)


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
    i_group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m_group = i_group < groups
    i_g = i_group % NUM_GROUPS
    first = (i_group - i_g) * parts + i_g
    n = tl.zeros((BLOCK, TILE), tl.float32)
    total = tl.zeros((BLOCK, TILE), tl.float32)
    # Relative to one of the means, so that no digits of a large one are lost.
    pivot = tl.load(means + first, mask=m_group, other=0.0)
    for k in range(0, parts, BLOCK):
        i_part = k + tl.arange(0, BLOCK)[:, None]
        mask = (i_part < parts) & m_group[None, :]
        i = i_part * NUM_GROUPS + first[None, :]
        b_n = tl.load(numbers + i, mask=mask, other=0.0)
        b_mean = tl.load(means + i, mask=mask, other=0.0)
        n += b_n
        total += masked(b_n * (b_mean - pivot[None, :]), mask)
    number = tl.maximum(tl.sum(n, axis=0), 1.0)
    group_mean = pivot + tl.sum(total, axis=0) / number
    square = tl.zeros((BLOCK, TILE), tl.float32)
    for k in range(0, parts, BLOCK):
        i_part = k + tl.arange(0, BLOCK)[:, None]
        mask = (i_part < parts) & m_group[None, :]
        i = i_part * NUM_GROUPS + first[None, :]
        b_n = tl.load(numbers + i, mask=mask, other=0.0)
        d = tl.load(means + i, mask=mask, other=0.0) - group_mean[None, :]
        square += tl.load(squares + i, mask=mask, other=0.0) + masked(b_n * d * d, mask)
    tl.store(mean + i_group, group_mean, mask=m_group)
    b_rstd = 1.0 / tl.sqrt(tl.sum(square, axis=0) / number + eps)
    tl.store(rstd + i_group, b_rstd, mask=m_group)


@triton.jit(do_not_specialize=["chunks", "rounds"])
def group_norm_silu_fwd_apply_kernel(
    y,
    mean,
    rstd,
    x,
    weight,
    bias,
    channel_bias,
    scale,
    shift,
    channel_bias_stride,
    scale_stride,
    shift_stride,
    pixels,
    chunks,
    rounds,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CH: tl.constexpr,
    PIX: tl.constexpr,
):
    """y of a channel tile and a chunk of pixels, `rounds` tiles long, with the moments known."""
    tile, chunk = split_program(chunks, CHANNELS_LAST)
    i_b, first, i_c, m_c = channels_of(tile, CHANNELS, GROUP_CHANNELS, GROUPS, CH)
    b_mean = load_groups(mean, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS)
    b_bias = load_channels(channel_bias, i_b, channel_bias_stride, i_c, m_c, 0.0)
    gamma, beta = affine(weight, bias, scale, scale_stride, shift, shift_stride, i_b, i_c, m_c)
    slope = load_groups(rstd, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS) * gamma

    for r in range(rounds):
        base, offsets, m_tile = tile_offsets(
            i_b,
            first,
            (chunk * rounds + r) * PIX,
            m_c,
            pixels,
            CHANNELS,
            CHANNELS_LAST,
            CH,
            PIX,
        )
        b_h = load_tile(x + base, offsets, m_tile)
        if channel_bias is not None:
            b_h += b_bias[:, None]
        b_d = b_h - b_mean[:, None]
        z = b_d * slope[:, None] + beta[:, None]
        b_y = activate(z, ACTIVATION).to(y.dtype.element_ty)
        tl.store(y + base + offsets, b_y, mask=m_tile)
