"""What a deterministic sampler makes of x_T: interpolation, consistency (DDIM §5.2-§5.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastdiff._models import Model
from fastdiff._types import check_tensors, check_type
from fastdiff.samplers.base import Sampler


def slerp(a: Tensor, b: Tensor, fraction: float | Tensor) -> Tensor:
    """sin((1 - f) w)/sin(w) a + sin(f w)/sin(w) b, w the angle between a and b (DDIM app. D.5).

    Stays at the norm that normal noise has, unlike a straight line.

    Parameters
    ----------
    a, b
        (B, ...), floating point; angles are those of each sample.
    fraction
        0 gives a, 1 gives b; a number, or (F,) for F results per pair.

    Returns
    -------
    Tensor
        Shape and dtype of a; (F, B, ...) for a tensor of fractions.

    Raises
    ------
    ValueError
        Shapes that differ.

    Examples
    --------
    >>> import torch, fastdiff
    >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> fastdiff.samplers.slerp(a, b, 0.5)
    tensor([[0.7071, 0.7071]])
    """
    check_tensors("slerp", a=a, b=b)
    if a.shape != b.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}, expected {tuple(a.shape)} as a")
    dtype = torch.promote_types(a.dtype, torch.float32)
    x, y = a.to(dtype).flatten(1), b.to(dtype).flatten(1)
    unit_x, unit_y = (v / v.norm(dim=1, keepdim=True) for v in (x, y))
    # Not acos of the product: that loses half the digits at small angles.
    angle = 2 * torch.atan2((unit_x - unit_y).norm(dim=1), (unit_x + unit_y).norm(dim=1))
    f = torch.as_tensor(fraction, dtype=dtype, device=a.device)[..., None]
    sine = angle.sin()
    parallel = sine < 1e-6  # there the straight line is the limit
    safe = torch.where(parallel, torch.ones_like(sine), sine)
    to_a = torch.where(parallel, 1 - f, ((1 - f) * angle).sin() / safe)
    to_b = torch.where(parallel, f, (f * angle).sin() / safe)
    out = to_a[..., None] * x + to_b[..., None] * y
    return out.reshape(*f.shape[:-1], *a.shape).to(a.dtype)


def interpolate(
    sampler: Sampler, model: Model, a: Tensor, b: Tensor, num: int = 9, **options: Any
) -> Tensor:
    """`num` samples per pair, from those of latents a to those of b (DDIM §5.3, app. D.5).

    Parameters
    ----------
    sampler
        A deterministic one.
    a, b
        x_T, (B, C, ...): noise, or what `encode` made of images.
    options
        As in `Sampler.sample`; tensors in `model_kwargs` must suit a batch of num * B, ordered as
        the result.

    Returns
    -------
    Tensor
        (num, B, C, ...).
    """
    check_type("interpolate", Sampler, sampler=sampler)
    if num < 2:
        raise ValueError(f"num is {num}, expected 2 or more")
    latents = slerp(a, b, torch.linspace(0, 1, num))
    return sampler.decode(model, latents.flatten(0, 1), **options).reshape(latents.shape)


def consistency(
    make: Callable[[int], Sampler],
    model: Model,
    x_T: Tensor,
    steps: Iterable[int] = (10, 20, 50, 100),
    **options: Any,
) -> dict[int, Tensor]:
    """Samples of the same x_T with different S: the same high-level content (DDIM §5.2, Fig. 5).

    Parameters
    ----------
    make
        S -> a deterministic sampler, e.g. `lambda S: DDIM(diffusion, S)`.
    x_T
        (B, C, ...).
    options
        As in `Sampler.sample`.

    Returns
    -------
    dict
        S -> samples (B, C, ...).
    """
    return {S: make(S).decode(model, x_T, **options) for S in steps}
