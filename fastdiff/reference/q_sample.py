"""Reference of `q_sample`: the closed-form forward process (DDPM eq. 4, Math §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.reference.philox import sample_keys
from fastdiff.reference.philox_normal import normals


def per_sample(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t] shaped (B, 1, ..., 1) to broadcast against `like`."""
    return table[t].reshape(-1, *[1] * (like.dim() - 1))


def pixels_from_uint8(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels 0..255 to pixels in [-1, 1]: (2 x - 255) / 255."""
    return (2 * x.to(dtype) - 255) / 255


def flip_samples(x: Tensor, flip: Tensor) -> Tensor:
    """Mirror the last dimension of the samples where `flip` (B,) is true."""
    return torch.where(flip.reshape(-1, *[1] * (x.dim() - 1)), x.flip(-1), x)


def q_sample(
    x0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    flip: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `fastdiff.ops.q_sample`. Without noise and seed: the mean sqrt(abar_t) x0 alone.

    Computes in float32, or in float64 if x0, a table or the result is float64.
    """
    if dtype is None:
        dtype = x0.dtype if x0.is_floating_point() else torch.float32
    tables = sqrt_alpha_bar.dtype, sqrt_one_minus_alpha_bar.dtype
    wide = torch.float64 in (x0.dtype, dtype, *tables)
    compute = torch.float64 if wide else torch.float32
    x = pixels_from_uint8(x0, compute) if x0.dtype == torch.uint8 else x0.to(compute)
    if flip is not None:
        x = flip_samples(x, flip)
    out = per_sample(sqrt_alpha_bar, t, x) * x
    if seed is not None:
        keys = seed if isinstance(seed, Tensor) else sample_keys(seed, len(x0), device=x0.device)
        noise = normals(keys, x0.shape, stream, compute)
    if noise is not None:
        out = out + per_sample(sqrt_one_minus_alpha_bar, t, x) * noise.to(compute)
    return out.to(dtype)
