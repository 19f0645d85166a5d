"""Guidance: how a sampler asks a model for its output (SPEC §7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Guidance(Protocol):
    """What `Sampler.sample(guidance=...)` accepts."""

    def __call__(
        self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, model_kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, float]:
        """(output, uncond, scale): the sampler step combines them inside its kernel.

        The step uses uncond + scale (output - uncond), or output alone where uncond is None.
        """
        ...


@dataclass(frozen=True)
class ClassifierFree:
    """eps^ = eps_uncond + scale (eps_cond - eps_uncond) (CFG eq. 6, SPEC §7).

    Two model calls per step: one with `model_kwargs`, one with `uncond_kwargs` put over them.

    Parameters
    ----------
    scale
        0: unconditional; 1: conditional (one call); above 1: guided.
    uncond_kwargs
        The model arguments that mean "no condition", e.g. `{"y": null_labels}`.

    Examples
    --------
    >>> import torch, fastdiff
    >>> labels, null = torch.tensor([3, 7]), torch.tensor([10, 10])
    >>> guidance = fastdiff.ClassifierFree(4.0, {"y": null})
    >>> # sampler.sample(model, (2, 1, 8, 8), guidance=guidance, model_kwargs={"y": labels})
    """

    scale: float
    uncond_kwargs: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.uncond_kwargs, Mapping):
            raise TypeError(
                f"uncond_kwargs is {type(self.uncond_kwargs).__name__}, expected a mapping of "
                "model arguments"
            )

    def __call__(
        self, model: Callable[..., Tensor], x_t: Tensor, t: Tensor, model_kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, float]:
        cond = model(x_t, t, **model_kwargs)
        if self.scale == 1:
            return cond, None, 1.0
        uncond = model(x_t, t, **{**model_kwargs, **self.uncond_kwargs})
        return cond, uncond, float(self.scale)
