"""Tiles of group_norm_silu that stay in registers from their only read on: the one-pass kernels.

A tile is cut into PIECES of its pixels. Every step goes through them one after the other, so that
one at a time is worked on. Where float32 values would not fit, elements of 16 bits are PACKED: held
as they lie in memory, two of the contiguous dimension to a register.

What a step makes of a piece, a compiler would rather keep for the next step than make it again, and
hold float32 after all. So packed pieces are unpacked with `again`: different multiples of a number
that is 0, of which the compiler does not know that it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group_norm_silu_tiles import channels_of, tile_offsets


@triton.jit
def piece_mask(
    piece,
    i_b,
    first,
    m_c,
    pixels,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CH: tl.constexpr,
    PIX: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Which elements of a piece exist."""
    first_pixel = piece * (PIX // PIECES)
    _, _, mask = tile_offsets(
        i_b, first, first_pixel, m_c, pixels, CHANNELS, CHANNELS_LAST, CH, PIX, SEGMENTS, PIECES
    )
    return mask


@triton.jit
def piece_offsets(
    piece,
    tile,
    i_b,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CH: tl.constexpr,
    PIX: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PIECES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Where a piece of channel tile number `tile` lies in sample i_b, as `tile_offsets` says it.

    In pairs of elements if PACKED: to these, half as many channels or pixels are contiguous.
    """
    C: tl.constexpr = 2 if PACKED and CHANNELS_LAST else 1  # channels, and below pixels, in one
    P: tl.constexpr = 2 if PACKED and not CHANNELS_LAST else 1
    _, first, _, m_c = channels_of(
        tile, CHANNELS // C, GROUP_CHANNELS // C, GROUPS, CH // C, SEGMENTS
    )
    base, offsets, mask = tile_offsets(
        i_b,
        first,
        piece * (PIX // PIECES // P),
        m_c,
        pixels // P,
        CHANNELS // C,
        CHANNELS_LAST,
        CH // C,
        PIX // P,
        SEGMENTS,
        PIECES,
    )
    return base, offsets, mask


@triton.jit
def load_pieces(
    p,
    tile,
    i_b,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CH: tl.constexpr,
    PIX: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PIECES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A tile, as a tuple of its pieces."""
    if PACKED:
        p = p.to(tl.pointer_type(tl.int32))
    held = ()
    for piece in tl.static_range(PIECES):
        base, offsets, mask = piece_offsets(
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
        held = held + (tl.load(p + base + offsets, mask=mask, other=0),)  # noqa: RUF005
    return held


@triton.jit
def unpack(
    held,
    again,
    DTYPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The float32 values of a piece, [rows, pixels]."""
    if PACKED:
        pairs = held ^ again
        b_first = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        b_second = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        values = tl.join(b_first.to(tl.float32), b_second.to(tl.float32))
        if CHANNELS_LAST:
            values = tl.permute(values, (0, 2, 1))
            values = tl.reshape(values, (2 * held.shape[0], held.shape[1]))
        else:
            values = tl.reshape(values, (held.shape[0], 2 * held.shape[1]))
    else:
        values = held.to(tl.float32)
    return values


@triton.jit
def plus(total, values):
    """`total` with the values of one more piece; None has none."""
    return values if total is None else total + values


@triton.jit
def store_piece(
    p,
    values,
    piece,
    tile,
    i_b,
    pixels,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CH: tl.constexpr,
    PIX: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PIECES: tl.constexpr,
    PACKED: tl.constexpr,
):
    base, offsets, mask = piece_offsets(
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
    values = values.to(p.dtype.element_ty)
    if PACKED:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        if CHANNELS_LAST:
            bits = tl.reshape(bits, (bits.shape[0] // 2, 2, bits.shape[1]))
            bits = tl.permute(bits, (0, 2, 1))
        else:
            bits = tl.reshape(bits, (bits.shape[0], bits.shape[1] // 2, 2))
        b_first, b_second = tl.split(bits)
        values = (b_first & 0xFFFF) | (b_second << 16)
        p = p.to(tl.pointer_type(tl.int32))
    tl.store(p + base + offsets, values, mask=mask)
