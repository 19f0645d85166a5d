"""Numbers that are not finite: found before they become files or weights, counted, and told."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastdiff.training.errors import NotFiniteError
from fastdiff.training.optimization import SMALLEST_SCALE

_ADVICE = "(a lower --lr or --grad-clip may help)"


def check_step(step: int, loss: float, norm: float, scale: float, fp16: bool) -> None:
    """Raise `NotFiniteError` for a step whose loss or gradient is not finite.

    Parameters
    ----------
    scale : float
        Loss scale.
    fp16 : bool
        Whether that adapts: a gradient that overflows is then part of finding it.
    """
    if not math.isfinite(loss):
        raise NotFiniteError(step, f"the loss is {loss} {_ADVICE}")
    if math.isfinite(norm):
        return
    if not fp16:
        raise NotFiniteError(step, f"the norm of the gradient is {norm} {_ADVICE}")
    if scale <= SMALLEST_SCALE:
        raise NotFiniteError(
            step,
            f"the norm of the gradient is {norm} in float16 even at the smallest loss scale, "
            f"{scale:g} (--amp bf16 or off, or a lower --lr, may help)",
        )


def check_weights(step: int, weights: Iterable[Tensor]) -> None:
    """Raise `NotFiniteError` for weights, or averages of them, that are not finite."""
    bad, total = count(weights)
    if bad:
        raise NotFiniteError(step, f"{bad:,} of {total:,} weights are not finite {_ADVICE}")


@torch.no_grad()
def count(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """How many numbers of floating-point tensors are not finite, of how many."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    bad = sum(int((~tensor.isfinite()).sum()) for tensor in floats)
    return bad, sum(tensor.numel() for tensor in floats)
