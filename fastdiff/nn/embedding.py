"""Embedding of the timestep."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff._device_cache import DeviceCache, is_plain_eager
from fastdiff.nn.config import TIME_EMBEDDINGS
from fastdiff.ops._library import is_dtensor

_cache = DeviceCache(None)

# torch.fx's tracer puts a call of it into the graph: it makes a tensor where t is.
torch.fx.wrap("_sinusoids")


def timestep_embedding(
    t: torch.Tensor,
    dim: int,
    kind: str = "ddpm",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Sinusoidal embedding of the timestep, ``half = dim / 2`` frequencies.

    ``"ddpm"``: ``[sin(t w_k), cos(t w_k)]`` with ``w_k = exp(-ln(10000) k / (half - 1))``;
    ``"openai"``: ``[cos(t w_k), sin(t w_k)]`` with ``w_k = exp(-ln(10000) k / half)``,
    k = 0 .. half-1.

    Parameters
    ----------
    t : (B,) integer or floating point
        0-based timestep; fractions are allowed.
    dim : int
        Even, at least 4.
    kind : {"ddpm", "openai"}
    dtype : torch.float32 or torch.float64
        Angles reach T radians, so anything below float32 would be wrong. Published networks were
        trained with float32 frequencies.

    Returns
    -------
    (B, dim) `dtype`

    Raises
    ------
    ValueError
        `kind` is unknown, or `dim` is odd or below 4.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762, §3.5; Math §11.
    """
    if kind not in TIME_EMBEDDINGS:
        raise ValueError(f"kind must be one of {', '.join(TIME_EMBEDDINGS)}, got {kind!r}")
    if dim < 4 or dim % 2:
        raise ValueError(f"dim must be even and at least 4, got {dim}")
    frequencies = _frequencies(t, dim // 2, kind, dtype)
    if is_dtensor(t):
        frequencies = t.from_local(frequencies, t.device_mesh)  # the same on every device
    if t.is_floating_point():
        t = t.to(dtype)
    angles = t[:, None] * frequencies  # of integers: converted on the way
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([sin, cos] if kind == "ddpm" else [cos, sin], dim=1)


def _frequencies(t: torch.Tensor, half: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """w_k on the device of t; on GPUs, where it is four kernels, computed once."""
    if not t.is_cuda or not is_plain_eager():
        return _build_frequencies(None, t.device, half, kind, dtype)
    return _cache.get(_build_frequencies, t.device, half, kind, dtype)


def _build_frequencies(
    owner: None, device: torch.device, half: int, kind: str, dtype: torch.dtype
) -> torch.Tensor:
    k = torch.arange(half, dtype=dtype, device=device)
    return torch.exp(-math.log(10000) * k / (half - 1 if kind == "ddpm" else half))


class TimestepEmbedding(nn.Module):
    """``linear_2(silu(linear_1(timestep_embedding(t))))``: (B,) -> (B, embed_dim).

    The sinusoids are computed on every call, not stored: a stored table would be rounded by
    ``module.to(torch.bfloat16)`` and lost by building on the meta device.
    """

    def __init__(self, dim: int, embed_dim: int, kind: str = "ddpm") -> None:
        super().__init__()
        self.dim = dim
        self.kind = kind
        self.linear_1 = nn.Linear(dim, embed_dim)
        self.linear_2 = nn.Linear(embed_dim, embed_dim)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        sinusoids = _sinusoids(t, self.dim, self.kind, self.linear_1.weight)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


def _sinusoids(t: torch.Tensor, dim: int, kind: str, weight: torch.Tensor) -> torch.Tensor:
    """The embedding in the dtype of the weight that it is multiplied with."""
    table_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return timestep_embedding(t, dim, kind, table_dtype).to(weight.dtype)
