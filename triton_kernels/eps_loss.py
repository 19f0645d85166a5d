"""eps_loss in Triton: one pass forward and one backward, noise given or made in the kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _launch, reduce
from ._layout import block_elements, sample_layout
from .philox import chunk_normals, noise_key

MSE, L1, HUBER = (tl.constexpr(k) for k in range(3))


@triton.jit
def loss_term(d, KIND: tl.constexpr):
    """Loss of elements with error d = prediction - noise."""
    if KIND == MSE:
        return d * d
    a = tl.abs(d)
    if KIND == L1:
        return a
    return tl.where(a < 1.0, 0.5 * d * d, a - 0.5)


@triton.jit
def loss_slope(d, KIND: tl.constexpr):
    """Its derivative; 0 at the kink of l1."""
    if KIND == MSE:
        return 2.0 * d
    if KIND == L1:
        return tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
    return tl.where(d > 1.0, 1.0, tl.where(d < -1.0, -1.0, d))


@triton.jit
def error(
    prediction,
    noise,
    key,
    stream,
    sample,
    first,
    numel,
    inner,
    LOGICAL_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """prediction - noise of memory indices first .. first + BLOCK - 1; 0 past the sample's end."""
    i = first + tl.arange(0, BLOCK)
    mask = i < numel
    p = tl.load(prediction + sample * numel + i, mask=mask, other=0.0).to(tl.float32)
    if noise is None:
        n = chunk_normals(key, stream, first, i, numel, inner, LOGICAL_ORDER, BLOCK)
    else:
        n = tl.load(noise + sample * numel + i, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, p - n, 0.0)


@triton.jit(do_not_specialize=["seed", "stream", "chunks", "scale"])
def eps_loss_fwd_kernel(
    out,
    prediction,
    noise,
    keys,
    weight,
    seed,
    stream,
    chunks,
    numel,
    inner,
    scale,
    KIND: tl.constexpr,
    WHOLE_SAMPLES: tl.constexpr,
    LOGICAL_ORDER: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of the losses of one chunk of one sample, or (WHOLE_SAMPLES) the sample's loss."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    begin = (program - sample * chunks) * (ROUNDS * BLOCK)
    key = noise_key(keys, seed, sample)
    acc = tl.zeros((BLOCK,), tl.float32)
    for r in range(ROUNDS):
        first = begin + r * BLOCK
        d = error(prediction, noise, key, stream, sample, first, numel, inner, LOGICAL_ORDER, BLOCK)
        acc += loss_term(d, KIND)
    total = tl.sum(acc, axis=0)
    if WHOLE_SAMPLES:
        if weight is not None:
            total *= tl.load(weight + sample)
        total = scale * total
    tl.store(out + program, total)


@triton.jit(do_not_specialize=["seed", "stream", "batch"])
def eps_loss_small_fwd_kernel(
    out,
    prediction,
    noise,
    keys,
    weight,
    seed,
    stream,
    batch,
    numel,
    inner,
    KIND: tl.constexpr,
    LOGICAL_ORDER: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weighted sum of the losses of SAMPLES whole samples."""
    program = tl.program_id(0).to(tl.int64)
    first = tl.full((), 0, tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(SAMPLES):
        sample = program * SAMPLES + k
        if sample < batch:
            key = noise_key(keys, seed, sample)
            d = error(
                prediction, noise, key, stream, sample, first, numel, inner, LOGICAL_ORDER, BLOCK
            )
            loss = loss_term(d, KIND)
            if weight is not None:
                loss *= tl.load(weight + sample)
            acc += loss
    tl.store(out + program, tl.sum(acc, axis=0))


@triton.jit(do_not_specialize=["seed", "stream", "chunks", "scale"])
def eps_loss_bwd_kernel(
    grad_prediction,
    grad_noise,
    grad,
    prediction,
    noise,
    keys,
    weight,
    seed,
    stream,
    chunks,
    numel,
    inner,
    scale,
    KIND: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    LOGICAL_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of one chunk of one sample."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first = (program - sample * chunks) * BLOCK
    key = noise_key(keys, seed, sample)
    factor = scale * tl.load(grad + sample if PER_SAMPLE else grad)
    if weight is not None:
        factor *= tl.load(weight + sample)
    d = error(prediction, noise, key, stream, sample, first, numel, inner, LOGICAL_ORDER, BLOCK)
    g = factor * loss_slope(d, KIND)
    i = first + tl.arange(0, BLOCK)
    base = sample * numel
    if grad_prediction is not None:
        rounded = g.to(grad_prediction.dtype.element_ty)
        tl.store(grad_prediction + base + i, rounded, mask=i < numel)
    if grad_noise is not None:
        tl.store(grad_noise + base + i, (-g).to(grad_noise.dtype.element_ty), mask=i < numel)


def samples_per_program(batch: int, sample_bytes: int) -> int:
    """Samples whose sums a program adds up before it writes, if only their total is wanted.

    A partial sum is written and read: 8 bytes. So the number of samples is doubled until that is at
    most a 48th of the prediction, as long as the programs fill a device or have 4 KB each.
    """
    enough = min(reduce.DEVICE_PROGRAMS, max(1, batch * sample_bytes // 4096))
    samples = 1
    while samples < 16 and samples * sample_bytes < 8 * 48 and batch // (2 * samples) >= enough:
        samples *= 2
    return samples


def eps_loss(
    out: Tensor,
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    scale: float,
    kind: int,
    channels_last: bool,
) -> None:
    """Fill `out`, (B,) or (). All tensors are dense, in the same memory format."""
    if out.numel() == 0:
        return
    layout = sample_layout(prediction, channels_last)
    block = block_elements(prediction.dtype)
    rounds = reduce.rounds_per_program(layout.numel, block)
    chunks = _launch.cdiv(layout.numel, rounds * block)
    whole_samples = out.dim() == 1 and chunks == 1
    small = out.dim() == 0 and chunks == 1
    sample_bytes = layout.numel * prediction.element_size()
    samples = samples_per_program(layout.batch, sample_bytes) if small else 1
    source = (prediction, noise, keys)
    numbers = (0 if seed is None else seed, stream)
    meta = {"KIND": kind, "LOGICAL_ORDER": layout.inner == 1, "BLOCK": block}
    if samples > 1:
        programs = _launch.cdiv(layout.batch, samples)
        sums = reduce.workspace(out, programs)
        sizes = (layout.batch, layout.numel, layout.inner)
        _launch.launch(
            eps_loss_small_fwd_kernel,
            programs,
            out.device,
            sums,
            *source,
            weight,
            *numbers,
            *sizes,
            SAMPLES=samples,
            **meta,
        )
        reduce.finish_sums(out, sums, None, 1, programs, scale)
        return
    programs = layout.batch * chunks
    sums = out if whole_samples else reduce.workspace(out, programs)
    if programs > 0:
        sizes = (chunks, layout.numel, layout.inner)
        _launch.launch(
            eps_loss_fwd_kernel,
            programs,
            out.device,
            sums,
            *source,
            weight if whole_samples else None,
            *numbers,
            *sizes,
            scale,
            WHOLE_SAMPLES=whole_samples,
            ROUNDS=rounds,
            **meta,
        )
    if not whole_samples:
        reduce.finish_sums(out, sums, weight, layout.batch, chunks, scale)


def eps_loss_backward(
    grad_prediction: Tensor | None,
    grad_noise: Tensor | None,
    grad: Tensor,
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    scale: float,
    kind: int,
    channels_last: bool,
) -> None:
    """Fill the gradients that are not None. All tensors are dense, in the same memory format."""
    if prediction.numel() == 0 or (grad_prediction is None and grad_noise is None):
        return
    layout = sample_layout(prediction, channels_last)
    block = block_elements(prediction.dtype)
    chunks = _launch.cdiv(layout.numel, block)
    tensors = grad_prediction, grad_noise, grad, prediction, noise, keys, weight
    numbers = 0 if seed is None else seed, stream
    sizes = chunks, layout.numel, layout.inner
    _launch.launch(
        eps_loss_bwd_kernel,
        layout.batch * chunks,
        prediction.device,
        *tensors,
        *numbers,
        *sizes,
        scale,
        KIND=kind,
        PER_SAMPLE=grad.dim() == 1,
        LOGICAL_ORDER=layout.inner == 1,
        BLOCK=block,
    )
