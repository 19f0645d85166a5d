"""Reference of `philox_normal`: normals that any kernel can regenerate (Math §9)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.reference.philox import sample_keys, sample_words


def box_muller(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pairs of words (last dimension even) to pairs of standard normals (Math §9).

    u1 = w0 2^-32 + 2^-32 and u2 = w1 2^-32 are float32 by definition; `dtype` is that of the
    arithmetic after them (float64 gives the oracle the kernels are compared with).
    """
    w0, w1 = words[..., 0::2].to(torch.float32), words[..., 1::2].to(torch.float32)
    u1 = (w0 * 2.0**-32 + 2.0**-32).to(dtype)
    turns = (w1 * 2.0**-30).to(dtype)  # in quarter turns, so that the range reduction is exact
    quadrant = turns.round()
    angle = (turns - quadrant) * (math.pi / 2)
    sin, cos = angle.sin(), angle.cos()
    q = quadrant.to(torch.int64)
    swap, sin_sign, cos_sign = q % 2 == 1, 1 - (q & 2), 1 - ((q + 1) & 2)
    radius = (-2 * u1.log()).sqrt()
    n0 = radius * torch.where(swap, sin, cos) * cos_sign
    n1 = radius * torch.where(swap, cos, sin) * sin_sign
    return torch.stack((n0, n1), dim=-1).flatten(-2)


def normals(
    keys: Tensor, shape: Sequence[int], stream: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normals of `shape` (B, ...) from per-sample keys (B,), computed in `dtype`."""
    numel = math.prod(shape[1:])
    # An odd tail still consumes whole pairs of words.
    words = sample_words(keys, numel + numel % 2, stream)
    return box_muller(words, dtype)[:, :numel].reshape(tuple(shape))


def philox_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """See `fastdiff.ops.philox_normal`."""
    keys = seed if isinstance(seed, Tensor) else sample_keys(seed, shape[0], device=device)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return normals(keys, shape, stream, compute).to(dtype).contiguous(memory_format=memory_format)
