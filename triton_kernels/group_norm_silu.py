"""group_norm_silu in Triton: one pass while a program can hold its groups, else two reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
from torch import Tensor

from . import _launch
from .group_norm_silu_one_pass import group_norm_silu_bwd_kernel, group_norm_silu_fwd_kernel
from .group_norm_silu_plan import Plan, plan, samples_per_program
from .group_norm_silu_split import (
    group_norm_silu_bwd_apply_kernel,
    group_norm_silu_bwd_finish_kernel,
    group_norm_silu_bwd_rows_kernel,
    group_norm_silu_bwd_sums_kernel,
    group_norm_silu_fwd_apply_kernel,
    group_norm_silu_fwd_merge_kernel,
    group_norm_silu_fwd_moments_kernel,
)
from .group_norm_silu_tiles import (
    Gradients,
    Operands,
    Residual,
    Sums,
    Tiling,
    row_stride,
    workspace,
)

if TYPE_CHECKING:
    from fastdiff.reference.dropout import Dropout

__all__ = ["group_norm_silu", "group_norm_silu_backward"]


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
    residual: Tensor | None = None,
    sum_bias: Tensor | None = None,
    summed: Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    """Fill `y`, as `x`, and `mean` and `rstd`, (B, G) float32.

    `x` is (B, C, *spatial), dense, contiguous or channels_last. `weight` and `bias` are (C,), the
    other small operands (B, C) with adjacent channels and any row stride; each of any float dtype.

    With a `residual`, as `x`, x + residual + sum_bias, (C,), takes the place of x: rounded to its
    dtype, and written to `summed`. `dropout` is of y.
    """
    if x.numel() == 0:
        return
    batch, channels = x.shape[:2]
    pixels = x[0, 0].numel()
    # One pixel: both formats are the same, and the channels are adjacent.
    channels_last = channels_last or pixels == 1
    cut = plan(
        channels,
        num_groups,
        pixels,
        x.element_size(),
        channels_last,
        arrays=1,
        max_blocks=_launch.max_blocks(x.device),
        pairs=_launch.holds_pairs(x, y, residual, summed),
        plain=residual is None and dropout is None,
    )
    mask = _mask(dropout)
    adds = None if residual is None else Residual(residual, sum_bias, summed)
    tiles = batch * cut.channel_tiles(channels, num_groups)
    operands = _operands(weight, bias, channel_bias, scale, shift)
    meta = cut.meta(channels, num_groups, channels_last)
    if cut.one_pass:
        _launch.launch(
            group_norm_silu_fwd_kernel,
            tiles,
            x.device,
            y,
            mean,
            rstd,
            x,
            operands,
            adds,
            *mask,
            pixels,
            eps,
            0,
            ACTIVATION=activation,
            **meta,
        )
        return

    chunks = _launch.cdiv(pixels, cut.pixels * cut.rounds)
    parts = cut.parts(channels, num_groups) * chunks
    moments = [workspace(x, mean.numel() * parts) for _ in range(3)]
    bias_only = Operands(channel_bias=channel_bias, channel_bias_stride=row_stride(channel_bias))
    _launch.launch(
        group_norm_silu_fwd_moments_kernel,
        tiles * chunks,
        x.device,
        *moments,
        x,
        bias_only,
        adds,
        pixels,
        chunks,
        cut.rounds,
        **meta,
    )
    _launch.launch(
        group_norm_silu_fwd_merge_kernel,
        _launch.cdiv(mean.numel(), 8),
        x.device,
        mean,
        rstd,
        *moments,
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
        y,
        mean,
        rstd,
        x if summed is None else summed,
        operands,
        *mask,
        pixels,
        chunks,
        cut.rounds,
        ACTIVATION=activation,
        **meta,
    )


def group_norm_silu_backward(
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_channel_bias: Tensor | None,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    channels_last: bool,
    grad_sum: Tensor | None = None,
    grad_sum_bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    """Fill the gradients that are not None, each contiguous (`grad_x` as `x`).

    `grad` and `x` are dense, in the same memory format; `mean` and `rstd` are the forward pass's.

    `grad_sum`, as `x`, is added to the gradient of x, which after a residual was added is the sum.
    `grad_sum_bias`, which asks for `grad_x`, are its sums over batch and pixels.
    """
    batch, channels = x.shape[:2]
    pixels = x.shape[2:].numel()
    # One pixel: both formats are the same, and the channels are adjacent.
    channels_last = channels_last or pixels == 1
    cut = plan(
        channels,
        num_groups,
        pixels,
        x.element_size(),
        channels_last,
        arrays=2,
        max_blocks=_launch.max_blocks(x.device),
        pairs=_launch.holds_pairs(x, grad, grad_x, grad_sum),
        plain=grad_sum is None and grad_sum_bias is None and dropout is None,
    )
    samples = samples_per_program(cut, batch, channels, num_groups, pixels, x.element_size())
    totals = Gradients(grad_weight, grad_bias, grad_sum_bias)
    # The shares of a program's samples in the totals: a single row is the totals.
    rows = batch // samples
    shares = totals if rows == 1 else _shares(totals, x, rows)
    if x.numel() > 0:
        _sample_gradients(
            grad_x,
            Gradients(*shares[:3], grad_channel_bias, grad_scale, grad_shift),
            (grad, x, mean, rstd),
            _operands(weight, bias, channel_bias, scale, shift),
            grad_sum,
            _mask(dropout),
            cut.meta(channels, num_groups, channels_last) | {"ACTIVATION": activation},
            cut,
            num_groups,
            samples,
        )
    if rows != 1:
        _add_rows(totals, shares, 1, rows, x)


def _shares(totals: Gradients, x: Tensor, rows: int) -> Gradients:
    """Memory for `rows` rows of shares in each total that is wanted."""
    size = rows * x.shape[1]
    weight, bias, sum_bias = totals[:3]
    return Gradients(
        None if weight is None else workspace(x, size),
        None if bias is None else workspace(x, size),
        None if sum_bias is None else workspace(x, size),
    )


def _add_rows(totals: Gradients, shares: Gradients, results: int, rows: int, x: Tensor) -> None:
    """Fill `results` rows of totals with the sums of `rows` rows of shares each."""
    if totals.weight is None and totals.bias is None and totals.sum_bias is None:
        return
    channels = x.shape[1]
    block = min(32, triton.next_power_of_2(channels))
    _launch.launch(
        group_norm_silu_bwd_rows_kernel,
        results * _launch.cdiv(channels, block),
        x.device,
        totals,
        shares,
        rows,
        CHANNELS=channels,
        ROWS=32,
        CH=block,
    )


def _sample_gradients(
    grad_x: Tensor | None,
    gradients: Gradients,
    inputs: tuple[Tensor, ...],
    operands: Operands,
    grad_sum: Tensor | None,
    mask: tuple[Any, ...],
    meta: dict[str, Any],
    cut: Plan,
    num_groups: int,
    samples: int,
) -> None:
    """What needs no sum over the batch, and the shares of each program's `samples`."""
    _, x, mean, rstd = inputs
    batch, channels, pixels = *x.shape[:2], x.shape[2:].numel()
    tiles = batch // samples * cut.channel_tiles(channels, num_groups)
    if cut.one_pass:
        _launch.launch(
            group_norm_silu_bwd_kernel,
            tiles,
            x.device,
            grad_x,
            gradients,
            *inputs,
            operands,
            grad_sum,
            *mask,
            pixels,
            0,
            SAMPLES=samples,
            **meta,
        )
        return

    chunks = _launch.cdiv(pixels, cut.pixels * cut.rounds)
    s0, s1 = (workspace(x, tiles * chunks * cut.channels) for _ in range(2))
    sums = Sums(s0, s1, None if gradients.channel_bias is None else workspace(x, s0.numel()))
    means = [workspace(x, mean.numel()) for _ in range(2)]
    _launch.launch(
        group_norm_silu_bwd_sums_kernel,
        tiles * chunks,
        x.device,
        sums,
        *inputs,
        operands,
        *mask,
        pixels,
        chunks,
        cut.rounds,
        **meta,
    )
    group_channels = channels // num_groups
    block = min(32, triton.next_power_of_2(group_channels))
    _launch.launch(
        group_norm_silu_bwd_finish_kernel,
        mean.numel(),
        x.device,
        *means,
        gradients,
        sums,
        rstd,
        operands._replace(
            channel_bias=None, shift=None, channel_bias_stride=None, shift_stride=None
        ),
        pixels,
        chunks,
        SPAN=group_channels * cut.groups,
        TILE=cut.channels,
        TILING=Tiling(channels, group_channels, groups=1, tile_channels=block),
        num_warps=1,
    )
    if grad_x is None:
        return
    total = Gradients(sum_bias=gradients.sum_bias)
    parts = _shares(total, x, batch * chunks)
    _launch.launch(
        group_norm_silu_bwd_apply_kernel,
        tiles * chunks,
        x.device,
        grad_x,
        parts.sum_bias,
        *means,
        *inputs,
        operands,
        grad_sum,
        *mask,
        pixels,
        chunks,
        cut.rounds,
        **meta,
    )
    _add_rows(total, parts, batch, chunks, x)


def _operands(
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Operands:
    rows = channel_bias, scale, shift
    return Operands(weight, bias, *rows, *(row_stride(operand) for operand in rows))


def _mask(dropout: Dropout | None) -> tuple[Tensor | None, int | None, int | None, int | None]:
    """keys, seed, stream and threshold as the kernels take them."""
    if dropout is None:
        return None, None, None, None
    threshold, keys, seed, stream = dropout
    return keys, 0 if seed is None else seed, stream, threshold
