"""group_norm_silu in Triton: one pass while a program can hold its groups, else two reads."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from . import _launch
from .group_norm_silu_one_pass import group_norm_silu_bwd_kernel, group_norm_silu_fwd_kernel
from .group_norm_silu_plan import Plan, plan, samples_per_program
from .group_norm_silu_split import (
    group_norm_silu_bwd_apply_kernel,
    group_norm_silu_bwd_finish_kernel,
    group_norm_silu_bwd_samples_kernel,
    group_norm_silu_bwd_sums_kernel,
    group_norm_silu_fwd_apply_kernel,
    group_norm_silu_fwd_merge_kernel,
    group_norm_silu_fwd_moments_kernel,
)
from .group_norm_silu_tiles import Gradients, Operands, Sums, Tiling, row_stride, workspace

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
    cut = plan(
        channels,
        num_groups,
        pixels,
        x.element_size(),
        channels_last,
        arrays=1,
        max_blocks=_launch.max_blocks(x.device),
        pairs=_launch.holds_pairs(x, y),
    )
    tiles = batch * cut.channel_tiles(channels, num_groups)
    operands = _operands(weight, bias, channel_bias, scale, shift)
    results_and_inputs = y, mean, rstd, x, operands, pixels
    meta = cut.meta(channels, num_groups, channels_last)
    if cut.one_pass:
        _launch.launch(
            group_norm_silu_fwd_kernel,
            tiles,
            x.device,
            *results_and_inputs,
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
        *results_and_inputs,
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
) -> None:
    """Fill the gradients that are not None, each contiguous (`grad_x` as `x`).

    `grad` and `x` are dense, in the same memory format; `mean` and `rstd` are the forward pass's.
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
        pairs=_launch.holds_pairs(x, grad, grad_x),
    )
    samples = samples_per_program(cut, batch, channels, num_groups, pixels, x.element_size())
    # The shares of a program's samples in dweight and dbias: a single row is the gradients.
    rows = batch // samples
    shares = grad_weight, grad_bias
    if rows != 1:
        shares = tuple(None if total is None else workspace(x, rows * channels) for total in shares)
    if x.numel() > 0:
        _sample_gradients(
            grad_x,
            Gradients(*shares, grad_channel_bias, grad_scale, grad_shift),
            (grad, x, mean, rstd),
            _operands(weight, bias, channel_bias, scale, shift),
            cut.meta(channels, num_groups, channels_last) | {"ACTIVATION": activation},
            cut,
            num_groups,
            samples,
        )
    if rows != 1 and not (grad_weight is None and grad_bias is None):
        block = min(32, triton.next_power_of_2(channels))
        _launch.launch(
            group_norm_silu_bwd_samples_kernel,
            _launch.cdiv(channels, block),
            x.device,
            grad_weight,
            grad_bias,
            *shares,
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
    meta: dict[str, Any],
    cut: Plan,
    num_groups: int,
    samples: int,
) -> None:
    """What needs no sum over the batch, and the shares of each program's `samples`."""
    _, x, mean, rstd = inputs
    channels, pixels = x.shape[1], x.shape[2:].numel()
    tiles = x.shape[0] // samples * cut.channel_tiles(channels, num_groups)
    if cut.one_pass:
        _launch.launch(
            group_norm_silu_bwd_kernel,
            tiles,
            x.device,
            grad_x,
            gradients,
            *inputs,
            operands,
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
    if grad_x is not None:
        _launch.launch(
            group_norm_silu_bwd_apply_kernel,
            tiles * chunks,
            x.device,
            grad_x,
            *means,
            *inputs,
            operands,
            pixels,
            chunks,
            cut.rounds,
            **meta,
        )


def _operands(
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Operands:
    rows = channel_bias, scale, shift
    return Operands(weight, bias, *rows, *(row_stride(operand) for operand in rows))
