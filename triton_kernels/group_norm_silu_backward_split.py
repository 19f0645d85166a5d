"""group_norm_silu's backward pass in two reads of x and grad, of groups too large to be held.

The formulas are in group_norm_silu_gradients.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group_norm_silu_gradients import input_gradient, normalized, store_channel_gradients
from .group_norm_silu_tiles import (
    affine,
    channels_of,
    load_channels,
    load_groups,
    load_tile,
    split_program,
    store_if_wanted,
    sum_products,
    tile_offsets,
)


@triton.jit(do_not_specialize=["chunks", "rounds"])
def group_norm_silu_bwd_sums_kernel(
    sums0,
    sums1,
    sums2,
    grad,
    x,
    mean,
    rstd,
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
    """s0, s1 and s2 of one channel tile over one chunk of pixels, `rounds` tiles long."""
    tile, chunk = split_program(chunks, CHANNELS_LAST)
    i_b, first, i_c, m_c = channels_of(tile, CHANNELS, GROUP_CHANNELS, GROUPS, CH)
    center = load_groups(mean, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS)
    center -= load_channels(channel_bias, i_b, channel_bias_stride, i_c, m_c, 0.0)
    b_rstd = load_groups(rstd, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS)
    gamma, beta = affine(weight, bias, scale, scale_stride, shift, shift_stride, i_b, i_c, m_c)

    s0 = tl.zeros((CH,), tl.float32)
    s1 = tl.zeros((CH,), tl.float32)
    s2 = tl.zeros((CH,), tl.float32)
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
        b_x = load_tile(x + base, offsets, m_tile)
        b_grad = load_tile(grad + base, offsets, m_tile)
        h_hat, dz = normalized(b_x, b_grad, m_tile, center, b_rstd, gamma, beta, ACTIVATION)
        s0 += tl.sum(dz, axis=1)
        s1 += sum_products(dz, h_hat, m_tile)
        if sums2 is not None:
            s2 += tl.sum(h_hat, axis=1)
    i = (tile * chunks + chunk) * CH + tl.arange(0, CH)  # a program's side by side
    tl.store(sums0 + i, s0, mask=m_c)
    tl.store(sums1 + i, s1, mask=m_c)
    store_if_wanted(sums2, i, s2, m_c)


@triton.jit
def add_chunks(
    p,
    i_b,
    i_c,
    m_c,
    chunks,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    CH: tl.constexpr,
):
    """Sums over the chunks of every channel, of which a program had TILE, or a span."""
    CHUNKS: tl.constexpr = 16
    PARTS: tl.constexpr = (SPAN + TILE - 1) // TILE
    i_local = i_c % SPAN
    i_tile = (i_b * (CHANNELS // SPAN) + i_c // SPAN) * PARTS + i_local // TILE
    total = tl.zeros((CH, CHUNKS), tl.float32)
    for k in range(0, chunks, CHUNKS):
        i = k + tl.arange(0, CHUNKS)[None, :]
        at = (i_tile[:, None] * chunks + i) * TILE + (i_local % TILE)[:, None]
        total += tl.load(p + at, mask=m_c[:, None] & (i < chunks), other=0.0)
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["chunks"])
def group_norm_silu_bwd_finish_kernel(
    means0,
    means1,
    weight_sums,
    bias_sums,
    grad_channel_bias,
    grad_scale,
    grad_shift,
    sums0,
    sums1,
    sums2,
    rstd,
    weight,
    bias,
    scale,
    scale_stride,
    pixels,
    chunks,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    CH: tl.constexpr,
):
    """m0 and m1 of one group of one sample, and the gradients of its small operands."""
    group = tl.program_id(0).to(tl.int64)
    PARTS: tl.constexpr = (GROUP_CHANNELS + CH - 1) // CH
    m0 = tl.zeros((CH,), tl.float32)
    m1 = tl.zeros((CH,), tl.float32)
    for part in range(PARTS):
        i_b, _, i_c, m_c = channels_of(group * PARTS + part, CHANNELS, GROUP_CHANNELS, 1, CH)
        gamma, _ = affine(weight, None, scale, scale_stride, None, 0, i_b, i_c, m_c)
        m0 += gamma * add_chunks(sums0, i_b, i_c, m_c, chunks, CHANNELS, SPAN, TILE, CH)
        m1 += gamma * add_chunks(sums1, i_b, i_c, m_c, chunks, CHANNELS, SPAN, TILE, CH)
    scaling = 1.0 / (GROUP_CHANNELS * 1.0 * pixels)
    group_m0 = tl.sum(m0, axis=0) * scaling
    group_m1 = tl.sum(m1, axis=0) * scaling
    tl.store(means0 + group, group_m0)
    tl.store(means1 + group, group_m1)
    b_rstd = tl.load(rstd + group)
    for part in range(PARTS):
        i_b, _, i_c, m_c = channels_of(group * PARTS + part, CHANNELS, GROUP_CHANNELS, 1, CH)
        gamma, _ = affine(weight, None, scale, scale_stride, None, 0, i_b, i_c, m_c)
        s0 = add_chunks(sums0, i_b, i_c, m_c, chunks, CHANNELS, SPAN, TILE, CH)
        s1 = add_chunks(sums1, i_b, i_c, m_c, chunks, CHANNELS, SPAN, TILE, CH)
        s2 = s0
        if sums2 is not None:
            s2 = add_chunks(sums2, i_b, i_c, m_c, chunks, CHANNELS, SPAN, TILE, CH)
        weight_share, bias_share = store_channel_gradients(
            grad_channel_bias,
            grad_scale,
            grad_shift,
            weight,
            bias,
            scale,
            scale_stride,
            pixels,
            s0,
            s1,
            s2,
            group_m0,
            group_m1,
            b_rstd,
            gamma,
            i_b,
            i_c,
            m_c,
            CHANNELS,
        )
        store_if_wanted(weight_sums, i_b * CHANNELS + i_c, weight_share, m_c)
        store_if_wanted(bias_sums, i_b * CHANNELS + i_c, bias_share, m_c)


@triton.jit(do_not_specialize=["chunks", "rounds"])
def group_norm_silu_bwd_apply_kernel(
    grad_x,
    means0,
    means1,
    grad,
    x,
    mean,
    rstd,
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
    """dx of a channel tile and a chunk of pixels, `rounds` tiles long, with m0 and m1 known."""
    tile, chunk = split_program(chunks, CHANNELS_LAST)
    i_b, first, i_c, m_c = channels_of(tile, CHANNELS, GROUP_CHANNELS, GROUPS, CH)
    center = load_groups(mean, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS)
    center -= load_channels(channel_bias, i_b, channel_bias_stride, i_c, m_c, 0.0)
    b_rstd = load_groups(rstd, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS)
    m0 = load_groups(means0, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS)
    m1 = load_groups(means1, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS)
    gamma, beta = affine(weight, bias, scale, scale_stride, shift, shift_stride, i_b, i_c, m_c)
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
        b_x = load_tile(x + base, offsets, m_tile)
        b_grad = load_tile(grad + base, offsets, m_tile)
        h_hat, dz = normalized(b_x, b_grad, m_tile, center, b_rstd, gamma, beta, ACTIVATION)
        b_dx = input_gradient(h_hat, dz, m0, m1, b_rstd, gamma).to(grad_x.dtype.element_ty)
        tl.store(grad_x + base + offsets, b_dx, mask=m_tile)
