"""Argument checks of noise schedules and timestep sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff._types import check_ints
from fastdiff.reference.checks import shown

Indices = Sequence[int] | np.ndarray | Tensor


def as_indices(indices: Indices, *, limit: int | None = None, name: str = "indices") -> Tensor:
    """`indices` as an int64 CPU tensor of its own, if they are strictly increasing in 0..limit-1.

    Raises
    ------
    TypeError, ValueError
        Not integers, not 1-D, empty, unsorted, repeated, or out of range.
    """
    try:
        tensor = torch.as_tensor(indices).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} is {shown(indices)}, expected integers") from error
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (S,) with S >= 1")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected integers")
    tensor = tensor.to(torch.int64, copy=True)
    drops = (tensor[1:] <= tensor[:-1]).nonzero()
    if drops.numel():
        i = int(drops[0])
        raise ValueError(
            f"{name} must be strictly increasing, but {int(tensor[i])} is followed by "
            f"{int(tensor[i + 1])}"
        )
    if int(tensor[0]) < 0 or (limit is not None and int(tensor[-1]) >= limit):
        bound = "0 or more" if limit is None else f"0..{limit - 1}"
        raise ValueError(
            f"{name} has values from {int(tensor[0])} to {int(tensor[-1])}, expected {bound}"
        )
    return tensor


def validated_length(num_timesteps: int) -> int:
    """T, if it is an int of at least 1."""
    check_ints(1, num_timesteps=num_timesteps)
    return int(num_timesteps)


def validated_betas(betas: Tensor | np.ndarray | Sequence[float]) -> Tensor:
    """A float64 copy (T,) of `betas` on the CPU, still differentiable, if all are in (0, 1]."""
    try:
        # Not torch.as_tensor, whose float32 default would round Python floats.
        tensor = betas if isinstance(betas, Tensor) else torch.from_numpy(np.asarray(betas, float))
    except (TypeError, ValueError) as error:
        raise TypeError(f"betas must be real numbers (T,), got {betas!r}") from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"betas has dtype {tensor.dtype}, expected floating point")
    tensor = tensor.to("cpu", torch.float64, copy=True)
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"betas has shape {tuple(tensor.shape)}, expected (T,) with T >= 1")
    bad = ~((tensor > 0) & (tensor <= 1))  # true for NaN too
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"betas[{i}] is {float(tensor[i].detach())}, expected values in (0, 1]")
    return tensor
