"""group_norm_silu forward in Triton: one pass while a program holds its groups, else two reads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from .group_norm_silu_backward import group_norm_silu_backward
from .group_norm_silu_forward_split import (
    group_norm_silu_fwd_apply_kernel,
    group_norm_silu_fwd_merge_kernel,
    group_norm_silu_fwd_moments_kernel,
)
from .group_norm_silu_held import load_pieces, piece_mask, plus, store_piece, unpack
from .group_norm_silu_plan import plan
from .group_norm_silu_tiles import (
    activate,
    affine,
    channels_of,
    first_elements,
    load_channels,
    masked,
    members,
    row_stride,
    spread,
    sum_groups,
    workspace,
)

__all__ = ["group_norm_silu", "group_norm_silu_backward"]


@triton.jit(do_not_specialize=["eps", "zero"])
def group_norm_silu_fwd_kernel(
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
    eps,
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
):
    """One span of whole groups of one sample, held in registers: x is read once."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    i_b, first, i_c, m_c = channels_of(tile, CHANNELS, GROUP_CHANNELS, GROUPS, CH, SEGMENTS)
    i_g, m_g, m_member = members(first, i_c, m_c, GROUP_CHANNELS, GROUPS, SEGMENTS)
    b_bias = load_channels(channel_bias, i_b, channel_bias_stride, i_c, m_c, 0.0)
    gamma, beta = affine(weight, bias, scale, scale_stride, shift, shift_stride, i_b, i_c, m_c)
    held = load_pieces(
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

    n = GROUP_CHANNELS * 1.0 * pixels
    total, square = None, None
    for piece in tl.static_range(PIECES):
        m_tile = piece_mask(
            piece, i_b, first, m_c, pixels, CHANNELS, CHANNELS_LAST, CH, PIX, SEGMENTS, PIECES
        )
        b_d = unpack(held[piece], 0, DTYPE, CHANNELS_LAST, PACKED) - pivot[:, None]
        total = plus(total, tl.where(m_tile, b_d, 0.0))
    b_mean = sum_groups(tl.sum(total, axis=1), m_member) / n
    center = pivot + spread(b_mean, m_member)
    b_mean += b_first + b_bias_first

    for piece in tl.static_range(PIECES):
        m_tile = piece_mask(
            piece, i_b, first, m_c, pixels, CHANNELS, CHANNELS_LAST, CH, PIX, SEGMENTS, PIECES
        )
        b_d = unpack(held[piece], zero, DTYPE, CHANNELS_LAST, PACKED) - center[:, None]
        square = plus(square, masked(b_d * b_d, m_tile))
    b_rstd = 1.0 / tl.sqrt(sum_groups(tl.sum(square, axis=1), m_member) / n + eps)
    p_group = i_b * (CHANNELS // GROUP_CHANNELS) + i_g
    tl.store(mean + p_group, b_mean, mask=m_g)
    tl.store(rstd + p_group, b_rstd, mask=m_g)

    slope = spread(b_rstd, m_member) * gamma
    for piece in tl.static_range(PIECES):
        b_d = unpack(held[piece], 2 * zero, DTYPE, CHANNELS_LAST, PACKED) - center[:, None]
        b_y = activate(b_d * slope[:, None] + beta[:, None], ACTIVATION)
        store_piece(
            y,
            b_y,
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


def group_norm_silu(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    channels_last: bool,
) -> None:
    """Fill `y`, as `x`, and `mean` and `rstd`, (B, G) float32.

    `x` is (B, C, *spatial), dense, contiguous or channels_last. `weight` and `bias` are (C,), the
    other small operands (B, C) with adjacent channels and any row stride; each of any float dtype.
    """
    if x.numel() == 0:
        return
    batch, channels = x.shape[:2]
    pixels = x[0, 0].numel()
    # One pixel: both formats are the same, and the channels are adjacent.
    channels_last = channels_last or pixels == 1
    blocks = _launch.max_blocks(x.device)
    cut = plan(
        channels,
        num_groups,
        pixels,
        x.element_size(),
        channels_last,
        arrays=1,
        max_blocks=blocks,
        pairs=_launch.holds_pairs(x, y),
    )
    tiles = batch * cut.channel_tiles(channels, num_groups)
    shape = cut.constants(channels, num_groups, channels_last)
    operands = (
        y,
        mean,
        rstd,
        x,
        weight,
        bias,
        channel_bias,
        scale,
        shift,
        row_stride(channel_bias),
        row_stride(scale),
        row_stride(shift),
        pixels,
    )
    if cut.one_pass:
        _launch.launch(
            group_norm_silu_fwd_kernel,
            tiles,
            x.device,
            *operands,
            eps,
            0,
            ACTIVATION=activation,
            **shape,
        )
        return

    chunks = triton.cdiv(pixels, cut.pixels * cut.rounds)
    parts = cut.parts(channels, num_groups) * chunks
    numbers, means, squares = (workspace(x, mean.numel() * parts) for _ in range(3))
    _launch.launch(
        group_norm_silu_fwd_moments_kernel,
        tiles * chunks,
        x.device,
        numbers,
        means,
        squares,
        x,
        channel_bias,
        row_stride(channel_bias),
        pixels,
        chunks,
        cut.rounds,
        **shape,
    )
    _launch.launch(
        group_norm_silu_fwd_merge_kernel,
        triton.cdiv(mean.numel(), 8),
        x.device,
        mean,
        rstd,
        numbers,
        means,
        squares,
        mean.numel(),
        parts,
        eps,
        NUM_GROUPS=num_groups,
        TILE=8,  # a sector
        BLOCK=64,
    )
    _launch.launch(
        group_norm_silu_fwd_apply_kernel,
        tiles * chunks,
        x.device,
        *operands,
        chunks,
        cut.rounds,
        ACTIVATION=activation,
        **shape,
    )
