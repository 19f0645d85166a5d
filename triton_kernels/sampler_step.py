"""ddim_step and ddpm_step in Triton: guidance, prediction, clip, update and noise in one pass."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._layout import block_elements, sample_layout
from .model_heads import head_index, head_of_tile, load_tile, plan_heads
from .philox import chunk_normals, noise_key

# The numbers are those of fastdiff/reference/step_columns.py.
EPS, X0, V, MEAN = (tl.constexpr(k) for k in range(4))
SQRT_ALPHA_BAR = tl.constexpr(0)
SQRT_ONE_MINUS_ALPHA_BAR = tl.constexpr(1)
RECIP_SQRT_ALPHA_BAR = tl.constexpr(2)
NOISE_TO_SIGNAL = tl.constexpr(3)
RECIP_SQRT_ONE_MINUS_ALPHA_BAR = tl.constexpr(4)
SIGNAL_TO_NOISE = tl.constexpr(5)
X0_FROM_MEAN = tl.constexpr(6)
X0_FROM_MEAN_X_T = tl.constexpr(7)
COEF_X0 = tl.constexpr(8)
COEF_X_T = tl.constexpr(9)
COEF_EPS = tl.constexpr(10)
SIGMA = tl.constexpr(11)
LOG_VARIANCE_SLOPE = tl.constexpr(13)
COLUMNS = tl.constexpr(16)


class TableRow(NamedTuple):
    """The row of the step table that a sample needs."""

    index: tl.tensor
    valid: tl.tensor  # inside of the table
    coefficients: tl.tensor  # a pointer to them


@triton.jit
def table_row(table, index, num_rows):
    valid = (index >= 0) & (index < num_rows)
    return TableRow(index, valid, table + index * COLUMNS)


@triton.jit
def column(row, COLUMN: tl.constexpr):
    """One coefficient; NaN for a step outside the table."""
    return tl.load(row.coefficients + COLUMN, mask=row.valid, other=float("nan"))


@triton.jit
def predicted_x0(row, x, output, PREDICTION: tl.constexpr):
    """x0 from the network's output."""
    if PREDICTION == EPS:
        a = column(row, RECIP_SQRT_ALPHA_BAR)
        return a * x - column(row, NOISE_TO_SIGNAL) * output
    if PREDICTION == V:
        a = column(row, SQRT_ALPHA_BAR)
        return a * x - column(row, SQRT_ONE_MINUS_ALPHA_BAR) * output
    if PREDICTION == MEAN:
        a = column(row, X0_FROM_MEAN)
        return a * output - column(row, X0_FROM_MEAN_X_T) * x
    return output


@triton.jit
def predicted_eps(
    row, x, output, x0, clipped, PREDICTION: tl.constexpr, FROM_CLIPPED: tl.constexpr
):
    """eps from the clipped x0, or from the network's output."""
    if PREDICTION == EPS and not FROM_CLIPPED:
        return output
    if PREDICTION == V and not FROM_CLIPPED:
        s = column(row, SQRT_ONE_MINUS_ALPHA_BAR)
        return s * x + column(row, SQRT_ALPHA_BAR) * output
    source = clipped if FROM_CLIPPED else x0
    a = column(row, RECIP_SQRT_ONE_MINUS_ALPHA_BAR)
    return a * x - column(row, SIGNAL_TO_NOISE) * source


@triton.jit
def exp_of(x):
    """exp(x) to 1.3 ulps, as in csrc/include/fastdiff/sampler_step.h; the hardware has fewer."""
    x = tl.where(x > 88.0, 88.0, x)
    x = tl.where(x < -87.0, -87.0, x)
    shifted = x * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = n * -0.693359375 + x
    r = n * 2.12194440e-4 + r
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * (r * r) + (r + 1.0)
    bits = (shifted.to(tl.uint32, bitcast=True) << 23) + 0x3F800000
    return p * bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed", "stream", "num_rows", "chunks", "guidance_scale"])
def sampler_step_fwd_kernel(
    x_s,
    pred_x0,
    x_t,
    model_output,
    uncond,
    noise,
    step,
    table,
    keys,
    seed,
    stream,
    num_rows,
    chunks,
    guidance_scale,
    numel,
    inner,
    span,
    PREDICTION: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_EPS: tl.constexpr,
    EPS_FROM_CLIPPED: tl.constexpr,
    TWO_HEADS: tl.constexpr,
    LEARNED: tl.constexpr,
    STAGED: tl.constexpr,
    GENERATE: tl.constexpr,
    LOGICAL_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of a sampler for one chunk of one sample."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    e = tl.arange(0, BLOCK)
    if STAGED:
        first = (program - sample * chunks) * span
        count = tl.minimum(numel - first, span)
        mask = e < count
    else:
        first = (program - sample * chunks) * BLOCK
        mask = first + e < numel
    i = first + e
    base = sample * numel

    row = table_row(table, tl.load(step + sample), num_rows)

    x = tl.load(x_t + base + i, mask=mask).to(tl.float32)
    if STAGED:
        tile = load_tile(model_output, base, first, count, BLOCK)
        output = head_of_tile(tile, inner, 0, BLOCK)
    else:
        head, to_variance = head_index(base, i, numel, inner, TWO_HEADS, LOGICAL_ORDER)
        output = tl.load(model_output + head, mask=mask).to(tl.float32)
    if uncond is not None:
        if STAGED:
            other = head_of_tile(load_tile(uncond, base, first, count, BLOCK), inner, 0, BLOCK)
        else:
            other = tl.load(uncond + head, mask=mask).to(tl.float32)
        output = other + guidance_scale * (output - other)

    x0 = predicted_x0(row, x, output, PREDICTION)
    clipped = x0
    if CLIP:  # comparisons, so that NaN stays NaN
        clipped = tl.where(clipped > 1.0, 1.0, clipped)
        clipped = tl.where(clipped < -1.0, -1.0, clipped)
    y = column(row, COEF_X0) * clipped + column(row, COEF_X_T) * x
    if HAS_EPS:
        eps = predicted_eps(row, x, output, x0, clipped, PREDICTION, EPS_FROM_CLIPPED)
        y += column(row, COEF_EPS) * eps
    if noise is not None or GENERATE:
        sigma = column(row, SIGMA)
        if LEARNED:
            if STAGED:
                v = head_of_tile(tile, inner, 1, BLOCK)
            else:
                v = tl.load(model_output + head + to_variance, mask=mask).to(tl.float32)
            sigma = sigma * exp_of(0.5 * column(row, LOG_VARIANCE_SLOPE) * v)
        if GENERATE:
            key = noise_key(keys, seed, sample)
            n = chunk_normals(key, stream, first, i, numel, inner, LOGICAL_ORDER, BLOCK)
        else:
            n = tl.load(noise + base + i, mask=mask).to(tl.float32)
        y += sigma * n
    tl.store(x_s + base + i, y.to(x_s.dtype.element_ty), mask=mask)
    if pred_x0 is not None:
        tl.store(pred_x0 + base + i, clipped.to(pred_x0.dtype.element_ty), mask=mask)


def sampler_step(
    x_s: Tensor,
    pred_x0: Tensor | None,
    x_t: Tensor,
    model_output: Tensor,
    uncond: Tensor | None,
    noise: Tensor | None,
    step: Tensor,
    table: Tensor,
    prediction: int,
    clip: bool,
    ddpm: bool,
    flag: bool,
    guidance_scale: float,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    channels_last: bool,
) -> None:
    """Fill `x_s` and `pred_x0`. All tensors are dense, in the same memory format.

    `flag` is learned_range of ddpm_step, else use_clipped_model_output of ddim_step.
    """
    if x_s.numel() == 0:
        return
    layout = sample_layout(x_t, channels_last)
    block = block_elements(x_s.dtype)
    two_heads = model_output.shape[1] != x_t.shape[1]
    heads = plan_heads(layout, two_heads, block)
    chunks = _launch.cdiv(layout.numel, heads.span)
    tensors = x_s, pred_x0, x_t, model_output, uncond, noise, step, table, keys
    numbers = 0 if seed is None else seed, stream, table.shape[0], chunks, guidance_scale
    sizes = layout.numel, layout.inner, heads.span
    _launch.launch(
        sampler_step_fwd_kernel,
        layout.batch * chunks,
        x_s.device,
        *tensors,
        *numbers,
        *sizes,
        PREDICTION=prediction,
        CLIP=clip,
        HAS_EPS=not ddpm,
        EPS_FROM_CLIPPED=not ddpm and clip and flag,
        TWO_HEADS=two_heads,
        LEARNED=ddpm and flag,
        STAGED=heads.staged,
        GENERATE=keys is not None or seed is not None,
        LOGICAL_ORDER=layout.inner == 1,
        BLOCK=block,
    )
