"""Deterministic sums over the elements of every sample, in two stages and without atomics.

The twin of csrc/include/fastdiff/reduce.cuh: a program sums one chunk of one sample, then the
chunks of a sample are added. The order depends only on the sample's own shape, so its sum does not
change with the batch around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch

REDUCTION_CHUNKS = 512
DEVICE_PROGRAMS = 116  # seven eighths of the multiprocessors of an H100


def rounds_per_program(numel: int, block: int) -> int:
    """Blocks of elements per program: a power of two, 1 up to REDUCTION_CHUNKS blocks a sample."""
    blocks = _launch.cdiv(numel, block)
    return 1 << max(0, (blocks // REDUCTION_CHUNKS).bit_length() - 1)


@triton.jit
def weighted_sums(
    partials, weight, tile, batch, chunks, SAMPLES: tl.constexpr, CHUNKS: tl.constexpr
):
    """weight[k] (sum of partials[k, :]) for SAMPLES samples, and their numbers."""
    sample = tile * SAMPLES + tl.arange(0, SAMPLES).to(tl.int64)
    valid = sample < batch
    acc = tl.zeros((SAMPLES, CHUNKS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        mask = valid[:, None] & (chunk < chunks)[None, :]
        acc += tl.load(partials + sample[:, None] * chunks + chunk[None, :], mask=mask, other=0.0)
    sums = tl.sum(acc, axis=1)
    if weight is not None:
        sums *= tl.load(weight + sample, mask=valid, other=0.0)
    return sums, sample


@triton.jit(do_not_specialize=["batch", "chunks", "scale"])
def finish_sums_kernel(
    out,
    partials,
    weight,
    batch,
    chunks,
    scale,
    TOTAL: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """scale times the weighted sum of every sample, or (TOTAL) of all, by one program."""
    if TOTAL:
        total = tl.zeros((SAMPLES,), tl.float32)
        for tile in range((batch + SAMPLES - 1) // SAMPLES):
            sums, _ = weighted_sums(partials, weight, tile, batch, chunks, SAMPLES, CHUNKS)
            total += sums
        tl.store(out, scale * tl.sum(total, axis=0))
    else:
        sums, sample = weighted_sums(
            partials, weight, tl.program_id(0), batch, chunks, SAMPLES, CHUNKS
        )
        tl.store(out + sample, scale * sums, mask=sample < batch)


def finish_sums(
    out: Tensor, partials: Tensor, weight: Tensor | None, batch: int, chunks: int, scale: float
) -> None:
    """Second stage: `out` (B,) or () from `partials` (batch * chunks,)."""
    total = out.dim() == 0
    samples = 16
    _launch.launch(
        finish_sums_kernel,
        1 if total else _launch.cdiv(batch, samples),
        out.device,
        out,
        partials,
        weight,
        batch,
        chunks,
        scale,
        TOTAL=total,
        SAMPLES=samples,
        CHUNKS=64,
    )


def workspace(like: Tensor, programs: int) -> Tensor:
    return torch.empty((max(programs, 1),), dtype=torch.float32, device=like.device)
