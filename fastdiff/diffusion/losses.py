"""Training losses by name (Math §6). A loss is one function from `LossInputs`, listed in LOSSES.

Errors are means over the elements of a sample and bounds bits per dimension, both float32 (B,). The
weights per timestep that errors may have are in `fastdiff.weightings`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion.process import Process
from fastdiff.diffusion.step_tables import LEARNED_VARIANCES
from fastdiff.reference.layout import memory_format_of
from fastdiff.reference.q_sample import flip_samples, per_sample, pixels_from_uint8


@dataclass(frozen=True)
class LossInputs:
    """What a loss may need about one batch."""

    diffusion: Process
    x0: Tensor  # as given: floating point, or uint8 levels
    x_t: Tensor
    t: Tensor
    noise: Tensor | None  # either the noise
    seed: int | Tensor | None  # or what it is made from
    stream: int
    flip: Tensor | None
    model_output: Tensor  # with the variance channels, if there are any
    output: Tensor  # the prediction in it (B, C, ...)
    weight: Tensor | None  # (B,) of the error at t

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
        """What the network should have predicted (Math §5)."""
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

    def weighted(self, error: Tensor) -> Tensor:
        """The error times the weight of its timestep."""
        return error if self.weight is None else self.weight * error

    def bound(self, *, detach_mean: bool = False) -> tuple[Tensor, Tensor]:
        """L_{t-1} (L_0 at t = 0) in bits/dim and the mean squared error of eps, each (B,).

        Unclipped, because clipped elements would get no gradient. The gradient of `detach_mean`
        reaches the variance channels alone.
        """
        diffusion = self.diffusion
        bound, _, eps_mse = ops.vlb_terms(
            self.pixels(),
            self.x_t,
            self.model_output,
            self.t,
            diffusion.bound_table(self.x_t.device),
            noise=self.noise,
            seed=self.seed,
            stream=self.stream,
            prediction=diffusion.prediction,
            variance=diffusion.variance,
            clip=False,
            detach_mean=detach_mean,
        )
        return bound, eps_mse


def mse(batch: LossInputs) -> dict[str, Tensor]:
    """Mean squared error over the elements of each sample; L_simple for eps (DDPM eq. 14)."""
    error = batch.error("mse")
    return {"loss": batch.weighted(error), "mse": error}


def rescaled_mse(batch: LossInputs) -> dict[str, Tensor]:
    """T times `mse`: its mean over t estimates the sum over the T timesteps."""
    parts = mse(batch)
    return {**parts, "loss": batch.diffusion.num_timesteps * parts["loss"]}


def l1(batch: LossInputs) -> dict[str, Tensor]:
    """Mean absolute error over the elements of each sample."""
    error = batch.error("l1")
    return {"loss": batch.weighted(error), "l1": error}


def huber(batch: LossInputs) -> dict[str, Tensor]:
    """Mean Huber error d^2/2 (|d| < 1), |d| - 1/2 beyond, over the elements of each sample."""
    error = batch.error("huber")
    return {"loss": batch.weighted(error), "huber": error}


def kl(batch: LossInputs) -> dict[str, Tensor]:
    """The bound's own term: L_{t-1}, or L_0 at t = 0, in bits/dim (DDPM eq. 5).

    Trains prediction and variance. Its mean over t is L_vlb / T without the constant L_T.
    """
    bound, eps_mse = batch.bound()
    return {"loss": bound, "vb": bound, "mse": eps_mse}


def rescaled_kl(batch: LossInputs) -> dict[str, Tensor]:
    """T times `kl`: its mean over t estimates L_vlb without L_T, in bits/dim."""
    parts = kl(batch)
    return {**parts, "loss": batch.diffusion.num_timesteps * parts["loss"]}


def hybrid(batch: LossInputs) -> dict[str, Tensor]:
    """L_simple + 0.001 L_vlb, whose gradient reaches the variance alone (IDDPM eq. 16).

    L_vlb is the sum of T terms, so that the term of one drawn t counts T / 1000: 1 for the usual
    T = 1000, as in IDDPM's code.
    """
    error = batch.error("mse")
    bound, _ = batch.bound(detach_mean=True)
    scale = VLB_WEIGHT * batch.diffusion.num_timesteps
    return {"loss": batch.weighted(error) + scale * bound, "mse": error, "vb": bound}


VLB_WEIGHT = 0.001
"""lambda of IDDPM eq. 16."""

LOSSES: dict[str, Callable[[LossInputs], dict[str, Tensor]]] = {
    "mse": mse,
    "rescaled_mse": rescaled_mse,
    "kl": kl,
    "rescaled_kl": rescaled_kl,
    "hybrid": hybrid,
    "l1": l1,
    "huber": huber,
}
"""Name -> function returning "loss" (B,) and its parts."""

TRAIN_VARIANCE: frozenset[str] = frozenset({"hybrid", "kl", "rescaled_kl"})
"""Losses that give a gradient to the variance channels."""

UNWEIGHTED: frozenset[str] = frozenset({"kl", "rescaled_kl"})
"""Losses that have the bound's weights and take no others."""


def check_loss(loss: str, variance: str, weighted: bool) -> None:
    """Raise ValueError if `loss` has no use for what it is combined with."""
    if loss == "hybrid" and variance not in LEARNED_VARIANCES:
        raise ValueError(
            f"loss='hybrid' adds to 'mse' what trains a variance, and variance={variance!r} is "
            f"fixed; choose variance={' or '.join(map(repr, LEARNED_VARIANCES))}, or loss='mse'"
        )
    if loss in UNWEIGHTED and weighted:
        raise ValueError(
            f"loss={loss!r} has the bound's own weights; leave weighting out, or choose loss='mse'"
        )
