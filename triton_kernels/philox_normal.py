"""philox_normal in Triton: the noise of the other kernels, in memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._layout import block_elements, sample_layout
from .philox import chunk_normals, noise_key


@triton.jit(do_not_specialize=["seed", "stream", "chunks"])
def philox_normal_kernel(
    out, keys, seed, stream, chunks, numel, inner, LOGICAL_ORDER: tl.constexpr, BLOCK: tl.constexpr
):
    """Standard normals for one chunk of one sample."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first = (program - sample * chunks) * BLOCK
    i = first + tl.arange(0, BLOCK)
    key = noise_key(keys, seed, sample)
    n = chunk_normals(key, stream, first, i, numel, inner, LOGICAL_ORDER, BLOCK)
    tl.store(out + sample * numel + i, n.to(out.dtype.element_ty), mask=i < numel)


def philox_normal(
    out: Tensor, keys: Tensor | None, seed: int | None, stream: int, channels_last: bool
) -> None:
    """Fill `out`, which is dense, contiguous or channels_last."""
    if out.numel() == 0:
        return
    layout = sample_layout(out, channels_last)
    block = block_elements(out.dtype)
    chunks = _launch.cdiv(layout.numel, block)
    _launch.launch(
        philox_normal_kernel,
        layout.batch * chunks,
        out.device,
        out,
        keys,
        0 if seed is None else seed,
        stream,
        chunks,
        layout.numel,
        layout.inner,
        LOGICAL_ORDER=layout.inner == 1,
        BLOCK=block,
    )
