"""Reference of `eps_loss`: the error of a predicted noise (DDPM eq. 14, Math §6)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.reference.philox import sample_keys
from fastdiff.reference.philox_normal import normals

LOSS_KINDS = ("mse", "l1", "huber")
REDUCTIONS = ("none", "mean", "sum")


def loss_terms(error: Tensor, kind: str) -> Tensor:
    """d^2, |d|, or Huber's loss: d^2 / 2 where |d| < 1, else |d| - 1/2 (Math §6)."""
    if kind == "mse":
        return error.square()
    if kind == "l1":
        return error.abs()
    return torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)


def eps_loss(
    prediction: Tensor,
    noise: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    kind: str = "mse",
) -> Tensor:
    """See `fastdiff.ops.eps_loss`. Computes in float32, in float64 for a float64 prediction."""
    compute = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    if seed is not None:
        keys = seed if isinstance(seed, Tensor) else sample_keys(seed, len(prediction))
        noise = normals(keys.to(prediction.device), prediction.shape, stream, compute)
    terms = loss_terms(prediction.to(compute) - noise.to(compute), kind)
    terms = terms.reshape(len(prediction), prediction.shape[1:].numel())
    samples = terms.sum(1) if reduction == "sum" else terms.mean(1)
    if weight is not None:
        samples = weight.to(compute) * samples
    if reduction == "none":
        return samples
    return samples.sum() if reduction == "sum" else samples.mean()
