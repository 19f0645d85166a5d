"""group_norm_silu in one pass: a program holds whole groups in registers and reads them once.

A held tile is cut into pieces of its pixels. Each step works on one piece at a time, as float32.
Where float32 values of the whole tile would not fit, elements of 16 bits are packed: held as they
lie in memory, two neighbours to a register.

To stop the compiler from keeping the unpacked float32 values alive between steps, each step XORs
the packed ones with a runtime zero: `zero`, or a multiple of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .group_norm_silu_dropout import Mask, dropped, keep_scale, words_of_tile
from .group_norm_silu_tiles import (
    Rows,
    Sums,
    activate,
    affine,
    input_gradient,
    load_channel_bias,
    load_statistics,
    masked,
    members_of,
    normalized,
    pivots,
    rounded_sum,
    rows_of,
    spread,
    store_channel_gradients,
    store_if_wanted,
    sum_groups,
    sum_segments,
    tile_offsets,
)
from .philox import dropout_bytes, noise_key


@triton.jit
def piece_mask(piece, rows, pixels, TILING: tl.constexpr):
    """Which elements of a piece exist."""
    first_pixel = piece * (TILING.tile_pixels // TILING.pieces)
    _, _, mask = tile_offsets(rows, first_pixel, pixels, TILING)
    return mask


@triton.jit
def piece_offsets(piece, tile, sample, pixels, HELD: tl.constexpr):
    """Where a piece of a tile lies in a sample, as `tile_offsets` says it, in units of HELD."""
    PACKED: tl.constexpr = HELD.packed
    PIXELS_IN_ONE: tl.constexpr = 1 if HELD.channels_last else 1 + PACKED
    rows = rows_of(tile, HELD)
    rows = Rows(sample, rows.first, rows.channel, rows.mask)
    first_pixel = piece * (HELD.tile_pixels // HELD.pieces)
    return tile_offsets(rows, first_pixel, pixels // PIXELS_IN_ONE, HELD)


@triton.jit
def load_piece(pointer, piece, tile, sample, pixels, HELD: tl.constexpr):
    """A piece of a tile, as it is held."""
    if HELD.packed:
        pointer = pointer.to(tl.pointer_type(tl.int32))
    base, offsets, mask = piece_offsets(piece, tile, sample, pixels, HELD)
    return tl.load(pointer + base + offsets, mask=mask, other=0)


@triton.jit
def load_pieces(pointer, tile, sample, pixels, HELD: tl.constexpr):
    """A tile, as a tuple of its pieces."""
    PIECES: tl.constexpr = HELD.pieces
    held = ()
    for piece in tl.static_range(PIECES):
        held = held + (load_piece(pointer, piece, tile, sample, pixels, HELD),)  # noqa: RUF005
    return held


@triton.jit
def half(pairs, SECOND: tl.constexpr, DTYPE: tl.constexpr):
    """The first or the second elements of pairs."""
    if SECOND:
        pairs = pairs >> 16
    return pairs.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def load_sum_pieces(x, residual, tile, rows, pixels, zero, HELD: tl.constexpr):
    """The rounded sums of a tile and its residual, as a tuple of pieces; they go to memory too.

    Pairs are added half by half: of sums of whole tiles `tl.split` would make them, whose second
    result Triton 3.8 mistakes for the first where it wants them in another layout, too.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PIECES: tl.constexpr = HELD.pieces
    HALVES: tl.constexpr = 2 if HELD.packed and HELD.channels_last else 1  # with their own channel
    held_rows = rows_of(tile, HELD)
    first_rows = Rows(rows.sample, rows.first, held_rows.channel * HALVES, held_rows.mask)
    second_rows = Rows(rows.sample, rows.first, first_rows.channel + HALVES - 1, held_rows.mask)
    held = ()
    for piece in tl.static_range(PIECES):
        x_piece = load_piece(x, piece, tile, rows.sample, pixels, HELD)
        other = load_piece(residual.x, piece, tile, rows.sample, pixels, HELD)
        if HELD.packed:
            first = half(x_piece, False, DTYPE)
            first = rounded_sum(first, half(other, False, DTYPE), residual, first_rows)
            second = half(x_piece, True, DTYPE)
            second = rounded_sum(second, half(other, True, DTYPE), residual, second_rows)
            total = pair(first, second) ^ zero  # or the halves are kept
        else:
            total = rounded_sum(x_piece, other, residual, first_rows)
        store_held(residual.sum, total, piece, tile, rows.sample, pixels, HELD)
        held = held + (total,)  # noqa: RUF005
    return held


@triton.jit
def dropped_pieces(held, dropout, rows, pixels, TILING: tl.constexpr, HELD: tl.constexpr):
    """Held pieces, with 0 for the elements that dropout drops. Pairs are of pixels."""
    PIECES: tl.constexpr = TILING.pieces
    ROWS: tl.constexpr = held[0].shape[0]
    WIDTH: tl.constexpr = held[0].shape[1]
    kept = ()
    for piece in tl.static_range(PIECES):
        first_pixel = piece * (TILING.tile_pixels // TILING.pieces)
        if HELD.packed:
            words = words_of_tile(dropout, rows, first_pixel, pixels, TILING)
            first = dropout_bytes(words, ROWS, WIDTH, FIRST=0, STEP=2) >= dropout.threshold
            second = dropout_bytes(words, ROWS, WIDTH, FIRST=1, STEP=2) >= dropout.threshold
            values = held[piece] & (tl.where(first, 0xFFFF, 0) | tl.where(second, -65536, 0))
        else:
            values = dropped(held[piece], dropout, rows, first_pixel, pixels, TILING)
        kept = kept + (values,)  # noqa: RUF005
    return kept


@triton.jit
def unpack(held, zero, DTYPE: tl.constexpr, HELD: tl.constexpr):
    """The float32 values of a piece, [rows, pixels]. `zero`: see the top of this file."""
    if HELD.packed:
        pairs = held ^ zero
        first, second = half(pairs, False, DTYPE), half(pairs, True, DTYPE)
        values = tl.join(first.to(tl.float32), second.to(tl.float32))
        if HELD.channels_last:
            values = tl.permute(values, (0, 2, 1))
            values = tl.reshape(values, (2 * held.shape[0], held.shape[1]))
        else:
            values = tl.reshape(values, (held.shape[0], 2 * held.shape[1]))
    else:
        values = held.to(tl.float32)
    return values


@triton.jit
def plus(total, values):
    """A running sum over pieces; it is None before the first."""
    return values if total is None else total + values


@triton.jit
def pair(first, second):
    """Pairs of elements of 16 bits."""
    first = first.to(tl.int16, bitcast=True).to(tl.int32)
    second = second.to(tl.int16, bitcast=True).to(tl.int32)
    return (first & 0xFFFF) | (second << 16)


@triton.jit
def store_held(pointer, held, piece, tile, sample, pixels, HELD: tl.constexpr):
    if HELD.packed:
        pointer = pointer.to(tl.pointer_type(tl.int32))
    base, offsets, mask = piece_offsets(piece, tile, sample, pixels, HELD)
    tl.store(pointer + base + offsets, held, mask=mask)


@triton.jit
def store_piece(pointer, values, piece, tile, sample, pixels, HELD: tl.constexpr):
    values = values.to(pointer.dtype.element_ty)
    if HELD.packed:
        if HELD.channels_last:
            values = tl.reshape(values, (values.shape[0] // 2, 2, values.shape[1]))
            values = tl.permute(values, (0, 2, 1))
        else:
            values = tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2))
        first, second = tl.split(values)
        values = pair(first, second)
    store_held(pointer, values, piece, tile, sample, pixels, HELD)


@triton.jit(do_not_specialize=["eps", "zero", "seed", "stream", "threshold"])
def group_norm_silu_fwd_kernel(
    y,
    mean,
    rstd,
    x,
    operands,
    residual,
    keys,
    seed,
    stream,
    threshold,
    pixels,
    eps,
    zero,
    ACTIVATION: tl.constexpr,
    TILING: tl.constexpr,
    HELD: tl.constexpr,
):
    """y, mean and rstd of one span of whole groups of one sample."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    PIECES: tl.constexpr = TILING.pieces
    tile = tl.program_id(0).to(tl.int64)
    rows = rows_of(tile, TILING)
    group, group_mask, member = members_of(rows, TILING)
    channel_bias = load_channel_bias(operands, rows)
    gamma, beta = affine(operands, rows)
    if residual is not None:
        held = load_sum_pieces(x, residual, tile, rows, pixels, 4 * zero, HELD)
    else:
        held = load_pieces(x, tile, rows.sample, pixels, HELD)

    pivot, first, first_bias = pivots(
        x, residual, operands, channel_bias, rows, group, group_mask, member, pixels, TILING
    )
    n = TILING.group_channels * 1.0 * pixels
    total, square = None, None
    for piece in tl.static_range(PIECES):
        mask = piece_mask(piece, rows, pixels, TILING)
        deviation = unpack(held[piece], 0, DTYPE, HELD) - pivot[:, None]
        total = plus(total, tl.where(mask, deviation, 0.0))
    group_mean = sum_groups(tl.sum(total, axis=1), member) / n
    center = pivot + spread(group_mean, member)
    group_mean += first + first_bias

    for piece in tl.static_range(PIECES):
        mask = piece_mask(piece, rows, pixels, TILING)
        deviation = unpack(held[piece], zero, DTYPE, HELD) - center[:, None]
        square = plus(square, masked(deviation * deviation, mask))
    group_rstd = 1.0 / tl.sqrt(sum_groups(tl.sum(square, axis=1), member) / n + eps)
    at = rows.sample * (TILING.channels // TILING.group_channels) + group
    tl.store(mean + at, group_mean, mask=group_mask)
    tl.store(rstd + at, group_rstd, mask=group_mask)

    slope = spread(group_rstd, member) * gamma
    for piece in tl.static_range(PIECES):
        deviation = unpack(held[piece], 2 * zero, DTYPE, HELD) - center[:, None]
        values = activate(deviation * slope[:, None] + beta[:, None], ACTIVATION)
        if threshold is not None:
            first_pixel = piece * (TILING.tile_pixels // TILING.pieces)
            dropout = Mask(noise_key(keys, seed, rows.sample), stream, threshold)
            values *= keep_scale(threshold)
            values = dropped(values, dropout, rows, first_pixel, pixels, TILING)
        store_piece(y, values, piece, tile, rows.sample, pixels, HELD)


@triton.jit(do_not_specialize=["zero", "seed", "stream", "threshold"])
def group_norm_silu_bwd_kernel(
    grad_x,
    gradients,
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
    zero,
    ACTIVATION: tl.constexpr,
    TILING: tl.constexpr,
    HELD: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """All gradients of one span of whole groups.

    Of SAMPLES samples one after the other, so that their shares in the gradients of weight and bias
    are added up here.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PIECES: tl.constexpr = TILING.pieces
    CH: tl.constexpr = TILING.tile_channels
    ROWS: tl.constexpr = TILING.segments * CH
    tile = tl.program_id(0).to(tl.int64)
    tile_rows = rows_of(tile, TILING)  # `sample` counts blocks of SAMPLES samples
    _, _, member = members_of(tile_rows, TILING)
    first_mask = tile_rows.mask & (tl.arange(0, ROWS) < CH)  # each channel once
    weight_share = tl.zeros((ROWS,), tl.float32)
    bias_share = tl.zeros((ROWS,), tl.float32)
    sum_bias_share = tl.zeros((ROWS,), tl.float32)
    for k in tl.static_range(SAMPLES):
        sample = tile_rows.sample * SAMPLES + k
        rows = Rows(sample, tile_rows.first, tile_rows.channel, tile_rows.mask)
        held_x = load_pieces(x, tile, sample, pixels, HELD)
        held_grad = load_pieces(grad, tile, sample, pixels, HELD)
        if threshold is not None:
            dropout = Mask(noise_key(keys, seed, sample), stream, threshold)
            held_grad = dropped_pieces(held_grad, dropout, rows, pixels, TILING, HELD)
        center, row_rstd = load_statistics(mean, rstd, x, operands, rows, pixels, TILING)
        gamma, beta = affine(operands, rows)

        s0, s1, s2 = None, None, None
        for piece in tl.static_range(PIECES):
            mask = piece_mask(piece, rows, pixels, TILING)
            x_piece = unpack(held_x[piece], 0, DTYPE, HELD)
            grad_piece = unpack(held_grad[piece], 0, DTYPE, HELD)
            if threshold is not None:
                grad_piece *= keep_scale(threshold)
            h_hat, dz = normalized(
                x_piece, grad_piece, mask, center, row_rstd, gamma, beta, ACTIVATION
            )
            s0 = plus(s0, dz)
            s1 = plus(s1, masked(dz * h_hat, mask))
            s2 = plus(s2, h_hat)
        row_s0 = tl.sum(s0, axis=1)
        row_s1 = tl.sum(s1, axis=1)
        row_s2 = tl.sum(s2, axis=1) if gradients.channel_bias is not None else row_s0
        scaling = 1.0 / (TILING.group_channels * 1.0 * pixels)
        m0 = spread(sum_groups(gamma * row_s0, member) * scaling, member)
        m1 = spread(sum_groups(gamma * row_s1, member) * scaling, member)
        sums = Sums(
            sum_segments(row_s0, rows, TILING),
            sum_segments(row_s1, rows, TILING),
            sum_segments(row_s2, rows, TILING),
        )
        first_rows = Rows(sample, rows.first, rows.channel, first_mask)
        weight_part, bias_part = store_channel_gradients(
            gradients, operands, sums, m0, m1, row_rstd, gamma, pixels, first_rows, TILING.channels
        )
        weight_share += weight_part
        bias_share += bias_part
        if k == SAMPLES - 1:  # before grad_x, which takes the registers
            at = tile_rows.sample * TILING.channels + tile_rows.channel
            store_if_wanted(gradients.weight, at, weight_share, first_mask)
            store_if_wanted(gradients.bias, at, bias_share, first_mask)
        if grad_x is not None:
            dx_sums = None
            for piece in tl.static_range(PIECES):
                mask = piece_mask(piece, rows, pixels, TILING)
                x_piece = unpack(held_x[piece], zero, DTYPE, HELD)
                grad_piece = unpack(held_grad[piece], zero, DTYPE, HELD)
                if threshold is not None:
                    grad_piece *= keep_scale(threshold)
                h_hat, dz = normalized(
                    x_piece, grad_piece, mask, center, row_rstd, gamma, beta, ACTIVATION
                )
                dx = input_gradient(h_hat, dz, m0, m1, row_rstd, gamma)
                if grad_sum is not None:
                    dx += unpack(
                        load_piece(grad_sum, piece, tile, sample, pixels, HELD), 0, DTYPE, HELD
                    )
                store_piece(grad_x, dx, piece, tile, sample, pixels, HELD)
                if gradients.sum_bias is not None:
                    dx_sums = plus(dx_sums, tl.where(mask, dx, 0.0))
            if gradients.sum_bias is not None:
                sum_bias_share += sum_segments(tl.sum(dx_sums, axis=1), rows, TILING)
                if k == SAMPLES - 1:
                    at = tile_rows.sample * TILING.channels + tile_rows.channel
                    store_if_wanted(gradients.sum_bias, at, sum_bias_share, first_mask)
