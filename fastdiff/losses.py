"""Training losses by name (SPEC §6). A loss is one function from `LossInputs`, listed in LOSSES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.reference.layout import memory_format_of
from fastdiff.reference.q_sample import flip_samples, per_sample, pixels_from_uint8

if TYPE_CHECKING:
    from fastdiff.gaussian import GaussianDiffusion


@dataclass(frozen=True)
class LossInputs:
    """What a loss may need about one batch."""

    diffusion: GaussianDiffusion
    x0: Tensor  # as given: floating point, or uint8 levels
    x_t: Tensor
    t: Tensor
    noise: Tensor | None  # either the noise
    seed: int | Tensor | None  # or what it is made from
    stream: int
    flip: Tensor | None
    output: Tensor  # the network's prediction (B, C, ...)
    variance_channels: Tensor | None

    def pixels(self) -> Tensor:
        """x0 in [-1, 1] in float32 or wider, mirrored where `flip` says so."""
        if self.x0.dtype == torch.uint8:
            x0 = pixels_from_uint8(self.x0)
        else:
            x0 = self.x0.to(torch.promote_types(self.x0.dtype, torch.float32))
        return x0 if self.flip is None else flip_samples(x0, self.flip)

    def stored_noise(self) -> Tensor:
        """The noise of x_t in memory, in the layout of x_t."""
        if self.noise is not None:
            return self.noise
        return ops.philox_normal(
            self.x_t.shape,
            self.seed,
            stream=self.stream,
            device=self.x_t.device,
            memory_format=memory_format_of(self.x_t),
        )

    def error(self, kind: str) -> Tensor:
        """Mean over the elements of each sample (B,) of a loss between output and target.

        `kind` as in `fastdiff.ops.eps_loss`. Noise that a seed stands for is not stored.
        """
        if self.diffusion.prediction == "eps" and self.noise is None:
            return ops.eps_loss(
                self.output, seed=self.seed, stream=self.stream, reduction="none", kind=kind
            )
        return ops.eps_loss(self.output, self.target(), reduction="none", kind=kind)

    def target(self) -> Tensor:
        """What the network should have predicted (SPEC §5)."""
        prediction, schedule = self.diffusion.prediction, self.diffusion.schedule
        if prediction == "eps":
            return self.stored_noise()
        x0 = self.pixels()
        if prediction == "x0":
            return x0
        if prediction == "mean":
            tables = schedule.tables(x0.device)
            x_t = self.x_t.to(x0.dtype)
            return ops.posterior_mean(
                x0, x_t, self.t, tables.posterior_coef_x0, tables.posterior_coef_x_t
            )
        # v = sqrt(abar) eps - sqrt(1-abar) x0, from the noise itself: x_t may be rounded to bf16.
        tables = schedule.tables(x0.device)
        a = per_sample(tables.sqrt_alpha_bar, self.t, x0)
        s = per_sample(tables.sqrt_one_minus_alpha_bar, self.t, x0)
        return a * self.stored_noise() - s * x0


def mse(batch: LossInputs) -> dict[str, Tensor]:
    """Mean squared error over the elements of each sample; L_simple for eps (DDPM eq. 14)."""
    error = batch.error("mse")
    return {"loss": error, "mse": error}


LOSSES: dict[str, Callable[[LossInputs], dict[str, Tensor]]] = {"mse": mse}
"""Name -> function returning "loss" (B,) and its parts."""

TRAIN_VARIANCE: frozenset[str] = frozenset()
"""Losses that give a gradient to the variance channels."""


def validated_weighting(weighting: Tensor | None, num_timesteps: int) -> Tensor | None:
    """None, or a copy of `weighting` if it is (T,) finite weights that are not negative.

    Raises
    ------
    ValueError
        Anything else.
    """
    if weighting is None:
        return None
    if not isinstance(weighting, Tensor):
        raise ValueError(
            f"unknown weighting {weighting!r}; choose None or a tensor ({num_timesteps},)"
        )
    if tuple(weighting.shape) != (num_timesteps,):
        raise ValueError(
            f"weighting has shape {tuple(weighting.shape)}, expected ({num_timesteps},), one "
            "weight per timestep"
        )
    if not bool((weighting.isfinite() & (weighting >= 0)).all()):
        raise ValueError("weighting must be finite and not negative")
    return weighting.clone()
