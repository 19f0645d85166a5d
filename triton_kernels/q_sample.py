"""q_sample in Triton: one pass, noise given or made in the kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._layout import block_elements, sample_layout
from .philox import chunk_normals, noise_key


@triton.jit
def load_pixels(x0, i, mask):
    """Elements as float32; uint8 levels 0..255 become pixels in [-1, 1]."""
    x = tl.load(x0 + i, mask=mask)
    if x0.dtype.element_ty == tl.uint8:
        return (2 * x.to(tl.int32) - 255).to(tl.float32) * 0.003921568859368563
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["seed", "stream", "num_timesteps", "chunks", "width"])
def q_sample_fwd_kernel(
    out,
    x0,
    noise,
    t,
    sqrt_alpha_bar,
    sqrt_one_minus_alpha_bar,
    keys,
    flip,
    seed,
    stream,
    num_timesteps,
    chunks,
    numel,
    inner,
    width,
    GENERATE: tl.constexpr,
    LOGICAL_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise for one chunk of one sample."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first = (program - sample * chunks) * BLOCK
    i = first + tl.arange(0, BLOCK)
    mask = i < numel
    base = sample * numel

    # Timesteps outside the tables give NaN: visible, and no read out of bounds.
    step = tl.load(t + sample)
    valid = (step >= 0) & (step < num_timesteps)
    a = tl.load(sqrt_alpha_bar + step, mask=valid, other=float("nan"))

    if flip is not None:
        if tl.load(flip + sample) != 0:
            column = (i // inner) % width
            x = load_pixels(x0 + base, i + (width - 1 - 2 * column) * inner, mask)
        else:
            x = load_pixels(x0 + base, i, mask)
    else:
        x = load_pixels(x0 + base, i, mask)

    y = a * x
    if noise is not None or GENERATE:
        b = tl.load(sqrt_one_minus_alpha_bar + step, mask=valid, other=float("nan"))
        if GENERATE:
            key = noise_key(keys, seed, sample)
            n = chunk_normals(key, stream, first, i, numel, inner, LOGICAL_ORDER, BLOCK)
        else:
            n = tl.load(noise + base + i, mask=mask).to(tl.float32)
        y += b * n
    tl.store(out + base + i, y.to(out.dtype.element_ty), mask=mask)


def q_sample(
    out: Tensor,
    x0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    flip: Tensor | None,
    channels_last: bool,
) -> None:
    """Fill `out`. All tensors are dense, in the same memory format."""
    if out.numel() == 0:
        return
    layout = sample_layout(x0, channels_last)
    block = block_elements(out.dtype)
    chunks = _launch.cdiv(layout.numel, block)
    tensors = out, x0, noise, t, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, keys, flip
    numbers = 0 if seed is None else seed, stream, sqrt_alpha_bar.shape[0], chunks
    sizes = layout.numel, layout.inner, layout.width
    _launch.launch(
        q_sample_fwd_kernel,
        layout.batch * chunks,
        out.device,
        *tensors,
        *numbers,
        *sizes,
        GENERATE=keys is not None or seed is not None,
        LOGICAL_ORDER=layout.inner == 1,
        BLOCK=block,
    )
