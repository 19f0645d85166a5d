"""group_norm_silu's backward pass: its formulas, and the kernel that holds whole groups.

With dz = grad act'(z) and, per channel of a sample, s0 = sum dz, s1 = sum dz h_hat, s2 = sum h_hat
over its pixels, and per group, gamma = weight (1 + scale), N elements, m0 = sum gamma s0 / N,
m1 = sum gamma s1 / N:

    dx = rstd (gamma dz - m0 - h_hat m1)       dchannel_bias = rstd (gamma s0 - pixels m0 - s2 m1)
    dshift = s0                                dscale = weight s1 + bias s0
    dbias = sum over samples of (1 + scale) s0
    dweight = sum over samples of (1 + scale) s1
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group_norm_silu_held import load_pieces, piece_mask, plus, store_piece, unpack
from .group_norm_silu_tiles import (
    activation_slope,
    affine,
    channels_of,
    load_channels,
    load_groups,
    masked,
    members,
    spread,
    store_if_wanted,
    sum_groups,
    sum_segments,
)


@triton.jit
def normalized(
    b_x,
    b_grad,
    m_tile,
    center,
    b_rstd,
    gamma,
    beta,
    ACTIVATION: tl.constexpr,
):
    """h_hat and dz of a tile of x and grad, 0 outside of it."""
    h_hat = masked((b_x - center[:, None]) * b_rstd[:, None], m_tile)
    z = h_hat * gamma[:, None] + beta[:, None]
    return h_hat, masked(b_grad * activation_slope(z, ACTIVATION), m_tile)


@triton.jit
def input_gradient(h_hat, dz, m0, m1, b_rstd, gamma):
    slope, m0, m1 = b_rstd * gamma, b_rstd * m0, b_rstd * m1
    return slope[:, None] * dz - m0[:, None] - m1[:, None] * h_hat


@triton.jit
def store_channel_gradients(
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
    m0,
    m1,
    b_rstd,
    gamma,
    i_b,
    i_c,
    m_c,
    CHANNELS: tl.constexpr,
):
    """What the sums over a sample's pixels say about the small operands.

    Returns its shares in the gradients of weight and bias, which are sums over the batch.
    """
    i = i_b * CHANNELS + i_c
    b_weight = load_channels(weight, 0, 0, i_c, m_c, 1.0)
    b_bias = load_channels(bias, 0, 0, i_c, m_c, 0.0)
    store_if_wanted(grad_scale, i, b_weight * s1 + b_bias * s0, m_c)
    store_if_wanted(grad_shift, i, s0, m_c)
    store_if_wanted(grad_channel_bias, i, b_rstd * (gamma * s0 - pixels * m0 - s2 * m1), m_c)
    b_scale = 1.0 + load_channels(scale, i_b, scale_stride, i_c, m_c, 0.0)
    return b_scale * s1, b_scale * s0


@triton.jit(do_not_specialize=["zero"])
def group_norm_silu_bwd_kernel(
    grad_x,
    weight_sums,
    bias_sums,
    grad_channel_bias,
    grad_scale,
    grad_shift,
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
    zero,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CH: tl.constexpr,
    PIX: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PIECES: tl.constexpr,
    PACKED: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """One span of whole groups, held in registers: x and grad are read once.

    Of SAMPLES samples one after the other, so that their shares in the gradients of weight and bias
    are added up here.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    row, first, i_c, m_c = channels_of(tile, CHANNELS, GROUP_CHANNELS, GROUPS, CH, SEGMENTS)
    _, _, m_member = members(first, i_c, m_c, GROUP_CHANNELS, GROUPS, SEGMENTS)
    m_first = m_c & (tl.arange(0, SEGMENTS * CH) < CH)  # each channel once
    weight_share = tl.zeros((SEGMENTS * CH,), tl.float32)
    bias_share = tl.zeros((SEGMENTS * CH,), tl.float32)
    for sample in tl.static_range(SAMPLES):
        i_b = row * SAMPLES + sample
        held_x = load_pieces(
            x,
            tile,
            i_b,
            pixels,
            CHANNELS,
            GROUP_CHANNELS,
            GROUPS,
            CHANNELS_LAST,
            CH,
            PIX,
            SEGMENTS,
            PIECES,
            PACKED,
        )
        held_grad = load_pieces(
            grad,
            tile,
            i_b,
            pixels,
            CHANNELS,
            GROUP_CHANNELS,
            GROUPS,
            CHANNELS_LAST,
            CH,
            PIX,
            SEGMENTS,
            PIECES,
            PACKED,
        )
        center = load_groups(mean, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS)
        center -= load_channels(channel_bias, i_b, channel_bias_stride, i_c, m_c, 0.0)
        b_rstd = load_groups(rstd, i_b, i_c, m_c, CHANNELS, GROUP_CHANNELS)
        gamma, beta = affine(weight, bias, scale, scale_stride, shift, shift_stride, i_b, i_c, m_c)

        b_s0, b_s1, b_s2 = None, None, None
        for piece in tl.static_range(PIECES):
            m_tile = piece_mask(
                piece, i_b, first, m_c, pixels, CHANNELS, CHANNELS_LAST, CH, PIX, SEGMENTS, PIECES
            )
            b_x = unpack(held_x[piece], 0, DTYPE, CHANNELS_LAST, PACKED)
            b_grad = unpack(held_grad[piece], 0, DTYPE, CHANNELS_LAST, PACKED)
            h_hat, dz = normalized(b_x, b_grad, m_tile, center, b_rstd, gamma, beta, ACTIVATION)
            b_s0 = plus(b_s0, dz)
            b_s1 = plus(b_s1, masked(dz * h_hat, m_tile))
            b_s2 = plus(b_s2, h_hat)
        s0 = tl.sum(b_s0, axis=1)
        s1 = tl.sum(b_s1, axis=1)
        s2 = tl.sum(b_s2, axis=1) if grad_channel_bias is not None else s0
        scaling = 1.0 / (GROUP_CHANNELS * 1.0 * pixels)
        m0 = spread(sum_groups(gamma * s0, m_member) * scaling, m_member)
        m1 = spread(sum_groups(gamma * s1, m_member) * scaling, m_member)
        s0 = sum_segments(s0, first, i_c, m_c, CH, SEGMENTS)
        s1 = sum_segments(s1, first, i_c, m_c, CH, SEGMENTS)
        s2 = sum_segments(s2, first, i_c, m_c, CH, SEGMENTS)
        weight_part, bias_part = store_channel_gradients(
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
            m0,
            m1,
            b_rstd,
            gamma,
            i_b,
            i_c,
            m_first,
            CHANNELS,
        )
        weight_share += weight_part
        bias_share += bias_part
        if sample == SAMPLES - 1:  # before grad_x, which takes the registers
            store_if_wanted(weight_sums, row * CHANNELS + i_c, weight_share, m_first)
            store_if_wanted(bias_sums, row * CHANNELS + i_c, bias_share, m_first)
        if grad_x is not None:
            for piece in tl.static_range(PIECES):
                m_tile = piece_mask(
                    piece,
                    i_b,
                    first,
                    m_c,
                    pixels,
                    CHANNELS,
                    CHANNELS_LAST,
                    CH,
                    PIX,
                    SEGMENTS,
                    PIECES,
                )
                b_x = unpack(held_x[piece], zero, DTYPE, CHANNELS_LAST, PACKED)
                b_grad = unpack(held_grad[piece], zero, DTYPE, CHANNELS_LAST, PACKED)
                h_hat, dz = normalized(b_x, b_grad, m_tile, center, b_rstd, gamma, beta, ACTIVATION)
                store_piece(
                    grad_x,
                    input_gradient(h_hat, dz, m0, m1, b_rstd, gamma),
                    piece,
                    tile,
                    i_b,
                    pixels,
                    CHANNELS,
                    GROUP_CHANNELS,
                    GROUPS,
                    CHANNELS_LAST,
                    CH,
                    PIX,
                    SEGMENTS,
                    PIECES,
                    PACKED,
                )
