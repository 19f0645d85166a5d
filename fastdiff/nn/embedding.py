"""Embedding of the timestep."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.nn.config import TIME_EMBEDDINGS
from fastdiff.nn.group_norm_silu import is_dtensor

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
    half = dim // 2
    k = torch.arange(half, dtype=dtype, device=t.device)
    frequencies = torch.exp(-math.log(10000) * k / (half - 1 if kind == "ddpm" else half))
    if is_dtensor(t):
        frequencies = t.from_local(frequencies, t.device_mesh)  # the same on every device
    angles = t.to(dtype)[:, None] * frequencies
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([sin, cos] if kind == "ddpm" else [cos, sin], dim=1)


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
