"""Inputs for elementwise ops: shapes and memory layouts that have broken kernels before."""

from __future__ import annotations

import torch
from torch import Tensor

T = 1000

SHAPES = {
    "vectors": (2, 3, 16, 16),
    "odd": (3, 3, 7, 5),
    "one element": (1, 1, 1, 1),
    "batch 0": (0, 3, 4, 4),
    "rows": (2, 17),
    "volume": (2, 4, 3, 4, 5),
    "many channels": (1, 260, 3, 4),
    "several chunks": (1, 4, 24, 24),
    "pictures": (1, 3, 24, 32),
}


def tables() -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar) of the linear schedule, float32 (T,)."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
    return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        last = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=last[x.dim()])
    if layout == "sliced":  # every second column of a wider tensor, starting at an odd address
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan")).to(x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "sliced channels_last":
        wide = torch.zeros(
            (x.shape[0], x.shape[1] + 1, *x.shape[2:]),
            dtype=x.dtype,
        ).contiguous(memory_format=torch.channels_last)
        wide[:, 1:] = x
        return wide[:, 1:]
    if layout == "expanded":  # one sample seen B times
        return x[:1].expand(x.shape)
    if layout == "misaligned channels_last":  # at 8 bytes past a multiple of 16
        shift = 8 // x.itemsize
        flat = torch.empty(x.numel() + shift, dtype=x.dtype)
        pixels = flat[shift:].view(x.shape[0], *x.shape[2:], x.shape[1])
        pixels.copy_(x.movedim(1, -1))
        return pixels.movedim(-1, 1)
    if layout == "misaligned":  # contiguous, but not at a multiple of 16 bytes
        flat = torch.empty(x.numel() + 1, dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    assert layout == "contiguous"
    return x
