"""group_norm_silu backward in Triton: one pass while a program holds its groups, else two reads.

The formulas are in group_norm_silu_gradients.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from .group_norm_silu_backward_split import (
    group_norm_silu_bwd_apply_kernel,
    group_norm_silu_bwd_finish_kernel,
    group_norm_silu_bwd_sums_kernel,
)
from .group_norm_silu_gradients import group_norm_silu_bwd_kernel
from .group_norm_silu_plan import Plan, plan, samples_per_program
from .group_norm_silu_tiles import row_stride, store_if_wanted, workspace


@triton.jit(do_not_specialize=["rows"])
def group_norm_silu_bwd_samples_kernel(
    grad_weight,
    grad_bias,
    weight_sums,
    bias_sums,
    rows,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    CH: tl.constexpr,
):
    """dweight and dbias of some channels: the sums over the shares, in the order of a program."""
    i_c = tl.program_id(0) * CH + tl.arange(0, CH)
    m_c = i_c < CHANNELS
    b_weight = tl.zeros((ROWS, CH), tl.float32)
    b_bias = tl.zeros((ROWS, CH), tl.float32)
    for first in range(0, rows, ROWS):
        i_row = first + tl.arange(0, ROWS).to(tl.int64)
        i = i_row[:, None] * CHANNELS + i_c[None, :]
        mask = (i_row < rows)[:, None] & m_c[None, :]
        if grad_weight is not None:
            b_weight += tl.load(weight_sums + i, mask=mask, other=0.0)
        if grad_bias is not None:
            b_bias += tl.load(bias_sums + i, mask=mask, other=0.0)
    store_if_wanted(grad_weight, i_c, tl.sum(b_weight, axis=0), m_c)
    store_if_wanted(grad_bias, i_c, tl.sum(b_bias, axis=0), m_c)


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
    blocks = _launch.max_blocks(x.device)
    cut = plan(
        channels,
        num_groups,
        pixels,
        x.element_size(),
        channels_last,
        arrays=2,
        max_blocks=blocks,
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
            (*shares, grad_channel_bias, grad_scale, grad_shift),
            grad_x,
            grad,
            x,
            mean,
            rstd,
            num_groups,
            (weight, bias, channel_bias, scale, shift),
            activation,
            channels_last,
            cut,
            samples,
        )
    if rows != 1 and not (grad_weight is None and grad_bias is None):
        block = min(32, triton.next_power_of_2(channels))
        _launch.launch(
            group_norm_silu_bwd_samples_kernel,
            triton.cdiv(channels, block),
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
    small: tuple[Tensor | None, ...],
    grad_x: Tensor | None,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    operands: tuple[Tensor | None, ...],
    activation: int,
    channels_last: bool,
    cut: Plan,
    samples: int,
) -> None:
    """What needs no sum over the batch; `small`: the shares, dchannel_bias, dscale and dshift."""
    channels, pixels = x.shape[1], x.shape[2:].numel()
    tiles = x.shape[0] // samples * cut.channel_tiles(channels, num_groups)
    meta = cut.constants(channels, num_groups, channels_last) | {"ACTIVATION": activation}
    weight, bias, channel_bias, scale, shift = operands
    strides = row_stride(channel_bias), row_stride(scale), row_stride(shift)
    inputs = (grad, x, mean, rstd, *operands, *strides, pixels)
    if cut.one_pass:
        meta["SAMPLES"] = samples
        operands = grad_x, *small, *inputs, 0
        _launch.launch(group_norm_silu_bwd_kernel, tiles, x.device, *operands, **meta)
        return

    chunks = triton.cdiv(pixels, cut.pixels * cut.rounds)
    sums = [workspace(x, tiles * chunks * cut.channels) for _ in range(2)]
    sums.append(None if small[2] is None else workspace(x, sums[0].numel()))
    means = [workspace(x, mean.numel()) for _ in range(2)]
    _launch.launch(
        group_norm_silu_bwd_sums_kernel,
        tiles * chunks,
        x.device,
        *sums,
        *inputs,
        chunks,
        cut.rounds,
        **meta,
    )
    _launch.launch(
        group_norm_silu_bwd_finish_kernel,
        mean.numel(),
        x.device,
        *means,
        *small,
        *sums,
        rstd,
        weight,
        bias,
        scale,
        row_stride(scale),
        pixels,
        chunks,
        CHANNELS=channels,
        GROUP_CHANNELS=channels // num_groups,
        SPAN=channels // num_groups * cut.groups,
        TILE=cut.channels,
        CH=min(32, triton.next_power_of_2(channels // num_groups)),
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
            chunks,
            cut.rounds,
            **meta,
        )
