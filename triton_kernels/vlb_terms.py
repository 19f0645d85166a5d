"""vlb_terms in Triton: one pass forward and one backward, noise given or made in the kernel."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _launch, reduce
from ._layout import block_elements, sample_layout
from .model_heads import head_index, head_of_tile, load_tile, plan_heads, store_tile
from .normal_tail import decoder_term, exp_minus_linear
from .philox import chunk_normals, noise_key
from .sampler_step import (
    COEF_X0,
    EPS,
    LOG_VARIANCE_SLOPE,
    MEAN,
    NOISE_TO_SIGNAL,
    SIGNAL_TO_NOISE,
    SQRT_ALPHA_BAR,
    SQRT_ONE_MINUS_ALPHA_BAR,
    X0_FROM_MEAN,
    V,
    column,
    exp_of,
    predicted_eps,
    predicted_x0,
    table_row,
)

LOG_VARIANCE = tl.constexpr(12)
POSTERIOR_LOG_VARIANCE = tl.constexpr(14)
BITS_PER_NAT = tl.constexpr(1.44269504)


@triton.jit
def slopes_of_prediction(row, PREDICTION: tl.constexpr):
    """Derivatives of the unclipped x0 and eps by the network's output."""
    if PREDICTION == EPS:
        return -column(row, NOISE_TO_SIGNAL), 1.0
    if PREDICTION == V:
        return -column(row, SQRT_ONE_MINUS_ALPHA_BAR), column(row, SQRT_ALPHA_BAR)
    if PREDICTION == MEAN:
        by_output = column(row, X0_FROM_MEAN)
        return by_output, -column(row, SIGNAL_TO_NOISE) * by_output
    return 1.0, -column(row, SIGNAL_TO_NOISE)


class Settings(NamedTuple):
    """What the kernels know at compile time."""

    prediction: int
    learned: bool  # the model's output has a second head, of variances
    staged: bool  # both heads are moved as one tile
    clip: bool
    logical_order: bool  # memory order is logical order
    block: int


class Inputs(NamedTuple):
    """The large inputs but for the noise."""

    x0: Tensor
    x_t: Tensor
    model_output: Tensor


class Terms(NamedTuple):
    """What the bound of each element is made of, as in csrc/include/fastdiff/vlb_terms.h."""

    x0: tl.tensor
    x0_error: tl.tensor  # x0 - x0^
    eps: tl.tensor  # eps^
    kept: tl.tensor  # the clip left x0^ alone
    z: tl.tensor
    inverse_sigma: tl.tensor
    w: tl.tensor


@triton.jit
def terms_of(inputs, row, sample, first, count, numel, inner, SETTINGS: tl.constexpr):
    """Those of memory indices first .. first + count - 1 of a sample, in a block."""
    BLOCK: tl.constexpr = SETTINGS.block
    model_output = inputs.model_output
    e = tl.arange(0, BLOCK)
    i = first + e
    mask = e < count
    base = sample * numel
    true_x0 = tl.load(inputs.x0 + base + i, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(inputs.x_t + base + i, mask=mask, other=0.0).to(tl.float32)
    log_variance = column(row, LOG_VARIANCE)
    if SETTINGS.staged:
        tile = load_tile(model_output, base, first, count, BLOCK)
        output = head_of_tile(tile, inner, 0, BLOCK)
    else:
        head, to_variance = head_index(
            base, i, numel, inner, SETTINGS.learned, SETTINGS.logical_order
        )
        output = tl.load(model_output + head, mask=mask, other=0.0).to(tl.float32)
    if SETTINGS.learned:
        if SETTINGS.staged:
            v = head_of_tile(tile, inner, 1, BLOCK)
        else:
            v = tl.load(model_output + head + to_variance, mask=mask, other=0.0).to(tl.float32)
        log_variance = log_variance + column(row, LOG_VARIANCE_SLOPE) * v
    raw = predicted_x0(row, x, output, SETTINGS.prediction)
    clipped = raw
    if SETTINGS.clip:  # comparisons, so that NaN stays NaN
        clipped = tl.where(clipped > 1.0, 1.0, clipped)
        clipped = tl.where(clipped < -1.0, -1.0, clipped)
    kept = raw == clipped
    eps = tl.where(
        kept,
        predicted_eps(row, x, output, raw, clipped, SETTINGS.prediction, False),
        predicted_eps(row, x, output, raw, clipped, SETTINGS.prediction, True),
    )
    x0_error = true_x0 - clipped
    inverse_sigma = exp_of(-0.5 * log_variance)
    z = column(row, COEF_X0) * x0_error * inverse_sigma
    w = column(row, POSTERIOR_LOG_VARIANCE) - log_variance
    return Terms(true_x0, x0_error, eps, kept, z, inverse_sigma, w)


@triton.jit
def load_noise(noise, key, stream, sample, first, count, numel, inner, SETTINGS: tl.constexpr):
    """The noise of memory indices first .. first + count - 1, in a block."""
    e = tl.arange(0, SETTINGS.block)
    i = first + e
    if noise is None:
        n = chunk_normals(
            key, stream, first, i, numel, inner, SETTINGS.logical_order, SETTINGS.block
        )
    else:
        n = tl.load(noise + sample * numel + i, mask=e < count, other=0.0).to(tl.float32)
    return n


@triton.jit(do_not_specialize=["seed", "stream", "num_rows", "chunks"])
def vlb_terms_fwd_kernel(
    partials,
    inputs,
    t,
    table,
    noise,
    keys,
    seed,
    stream,
    num_rows,
    chunks,
    numel,
    inner,
    span,
    SETTINGS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Sums of the bound's terms in bits and of the squared errors of one chunk of one sample."""
    BLOCK: tl.constexpr = SETTINGS.block
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    width = span if SETTINGS.staged else BLOCK
    begin = (program - sample * chunks) * (ROUNDS * width)
    key = noise_key(keys, seed, sample)
    row = table_row(table, tl.load(t + sample), num_rows)
    bits = tl.zeros((BLOCK,), tl.float32)
    x0_square = tl.zeros((BLOCK,), tl.float32)
    eps_square = tl.zeros((BLOCK,), tl.float32)
    for r in range(ROUNDS):
        first = begin + r * width
        count = tl.minimum(numel - first, width)
        terms = terms_of(inputs, row, sample, first, count, numel, inner, SETTINGS)
        n = load_noise(noise, key, stream, sample, first, count, numel, inner, SETTINGS)
        if row.index == 0:
            nats, _slope_z, _slope_h = decoder_term(terms.x0, terms.z, terms.inverse_sigma)
        else:
            nats = 0.5 * (exp_minus_linear(terms.w) + terms.z * terms.z)
        mask = tl.arange(0, BLOCK) < count
        bits += tl.where(mask, BITS_PER_NAT * nats, 0.0)
        x0_square += tl.where(mask, terms.x0_error * terms.x0_error, 0.0)
        eps_square += tl.where(mask, (n - terms.eps) * (n - terms.eps), 0.0)
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(partials + program, tl.sum(bits, axis=0))
    tl.store(partials + programs + program, tl.sum(x0_square, axis=0))
    tl.store(partials + 2 * programs + program, tl.sum(eps_square, axis=0))


@triton.jit(do_not_specialize=["seed", "stream", "num_rows", "batch", "chunks"])
def vlb_terms_bwd_kernel(
    grad_output,
    grad,
    inputs,
    t,
    table,
    noise,
    keys,
    seed,
    stream,
    num_rows,
    batch,
    chunks,
    numel,
    inner,
    span,
    SETTINGS: tl.constexpr,
    DETACH_MEAN: tl.constexpr,
):
    """Gradient of the model's output of one chunk of one sample.

    Where the gradient of eps_mse is zero the noise is neither read nor made.
    """
    BLOCK: tl.constexpr = SETTINGS.block
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    width = span if SETTINGS.staged else BLOCK
    first = (program - sample * chunks) * width
    count = tl.minimum(numel - first, width)
    row = table_row(table, tl.load(t + sample), num_rows)
    scale = 1.0 / numel
    grad_kl = scale * BITS_PER_NAT * tl.load(grad + sample)
    grad_x0 = scale * tl.load(grad + batch + sample)
    grad_eps = scale * tl.load(grad + 2 * batch + sample)

    terms = terms_of(inputs, row, sample, first, count, numel, inner, SETTINGS)
    eps_error = tl.zeros((BLOCK,), tl.float32)
    if grad_eps != 0.0:
        key = noise_key(keys, seed, sample)
        n = load_noise(noise, key, stream, sample, first, count, numel, inner, SETTINGS)
        eps_error = n - terms.eps
    if row.index == 0:
        _nats, slope_z, slope_h = decoder_term(terms.x0, terms.z, terms.inverse_sigma)
        slope_log_variance = -0.5 * (terms.z * slope_z + slope_h)
    else:
        slope_z = terms.z
        slope_log_variance = -0.5 * (exp_minus_linear(terms.w) + terms.w + terms.z * terms.z)

    x0_by_output, eps_by_output = slopes_of_prediction(row, SETTINGS.prediction)
    by_x0 = grad_kl * slope_z * column(row, COEF_X0) * terms.inverse_sigma
    by_x0 += 2.0 * grad_x0 * terms.x0_error
    g = -(by_x0 * x0_by_output + 2.0 * grad_eps * eps_error * eps_by_output)
    g = g * tl.where(terms.kept, 1.0, 0.0)  # NaN stays NaN
    if DETACH_MEAN:
        g = tl.zeros((BLOCK,), tl.float32)
    g = g.to(grad_output.dtype.element_ty)
    base = sample * numel
    g_v = grad_kl * column(row, LOG_VARIANCE_SLOPE) * slope_log_variance
    g_v = g_v.to(grad_output.dtype.element_ty)
    if SETTINGS.staged:
        store_tile(grad_output, g, g_v, base, first, count, inner, BLOCK)
    else:
        e = tl.arange(0, BLOCK)
        head, to_variance = head_index(
            base, first + e, numel, inner, SETTINGS.learned, SETTINGS.logical_order
        )
        tl.store(grad_output + head, g, mask=e < count)
        if SETTINGS.learned:
            tl.store(grad_output + head + to_variance, g_v, mask=e < count)


def vlb_terms(
    out: Tensor,
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    prediction: int,
    learned: bool,
    clip: bool,
    detach_mean: bool,
    channels_last: bool,
) -> None:
    """Fill `out`, (3, B). All tensors are dense, in the same memory format."""
    if out.numel() == 0:
        return
    layout = sample_layout(x_t, channels_last)
    block = block_elements(model_output.dtype)
    heads = plan_heads(layout, learned, block)
    settings = Settings(prediction, learned, heads.staged, clip, layout.inner == 1, block)
    rounds = reduce.rounds_per_program(layout.numel, heads.span)
    chunks = _launch.cdiv(layout.numel, rounds * heads.span)
    partials = reduce.workspace(out, 3 * layout.batch * chunks)
    if chunks > 0:
        tensors = partials, Inputs(x0, x_t, model_output), t, table, noise, keys
        numbers = 0 if seed is None else seed, stream, table.shape[0], chunks
        sizes = layout.numel, layout.inner, heads.span
        _launch.launch(
            vlb_terms_fwd_kernel,
            layout.batch * chunks,
            out.device,
            *tensors,
            *numbers,
            *sizes,
            SETTINGS=settings,
            ROUNDS=rounds,
        )
    scale = 1.0 / layout.numel if layout.numel else float("inf")
    reduce.finish_sums(out.view(-1), partials, None, 3 * layout.batch, chunks, scale)


def vlb_terms_backward(
    grad_output: Tensor,
    grad: Tensor,
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    prediction: int,
    learned: bool,
    clip: bool,
    detach_mean: bool,
    channels_last: bool,
) -> None:
    """Fill `grad_output`. All tensors are dense, in the same memory format."""
    if grad_output.numel() == 0:
        return
    layout = sample_layout(x_t, channels_last)
    block = block_elements(model_output.dtype)
    heads = plan_heads(layout, learned, block)
    settings = Settings(prediction, learned, heads.staged, clip, layout.inner == 1, block)
    chunks = _launch.cdiv(layout.numel, heads.span)
    tensors = grad_output, grad, Inputs(x0, x_t, model_output), t, table, noise, keys
    numbers = 0 if seed is None else seed, stream, table.shape[0], layout.batch, chunks
    sizes = layout.numel, layout.inner, heads.span
    _launch.launch(
        vlb_terms_bwd_kernel,
        layout.batch * chunks,
        grad_output.device,
        *tensors,
        *numbers,
        *sizes,
        SETTINGS=settings,
        DETACH_MEAN=detach_mean,
    )
