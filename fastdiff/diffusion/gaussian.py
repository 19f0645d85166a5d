"""Gaussian diffusion: forward process, posterior, reverse process, training losses (Math §3-§6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._device_cache import DeviceCache
from fastdiff._models import Model
from fastdiff._types import check_name, check_tensors
from fastdiff.diffusion import bound, forward_steps, losses
from fastdiff.diffusion.parameterizations import convert
from fastdiff.diffusion.process import Process, draw_keys
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.weightings import validated_weighting
from fastdiff.reference.q_sample import per_sample


@dataclass(frozen=True)
class ReverseStep:
    """p(x_{t-1} | x_t) and the predictions behind it, each shaped like x_t.

    `variance` and `log_variance` are float32 (views of one value per sample if fixed). `pred_eps`
    belongs to `pred_x0`: it is recomputed where that was clipped.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x0: Tensor
    pred_eps: Tensor


class GaussianDiffusion(Process):
    """A noise schedule together with what the network predicts and how it is trained.

    Parameters
    ----------
    schedule
        The forward process.
    prediction
        What the network predicts: "eps", "x0", "v", or "mean" (of the posterior) (Math §5).
    variance
        Of p(x_{t-1} | x_t): "fixed_large" (beta), "fixed_small" (beta~), "learned" (the network's
        second half of channels is the log variance), "learned_range" (IDDPM eq. 15) (Math §4).
    loss
        Of the prediction: "mse" (L_simple, DDPM eq. 14, for eps), "rescaled_mse" (T times it),
        "l1", "huber"; the bound: "kl", "rescaled_kl" (T times it); both: "hybrid" (IDDPM eq. 16).
        Learned variances are trained with "hybrid" or the bound (Math §6,
        `fastdiff.diffusion.losses`).
    weighting
        Of the error of the prediction at every timestep (L_gamma, DDIM eq. 5): None, a name in
        `fastdiff.weightings` ("min_snr", "snr", "snr_plus_one", "truncated_snr", "p2", "exact"), or
        a tensor (T,).
    self_conditioning
        Whether the network takes its own estimate of x0 as `x_self_cond` (Chen et al. 2022, Math
        §7): samplers then give it that of the step before. Where there is none it is left out.

    Raises
    ------
    ValueError
        Unknown names (listing the known ones), a weighting of the wrong shape, a loss that has no
        use for the variance or the weighting, or eps-prediction on a schedule with zero terminal
        SNR: x_T = eps there, which tells nothing about x0.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(1000))
    >>> x0, t = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randint(1000, (4,))
    >>> loss = diffusion.training_losses(lambda x, t: torch.zeros_like(x), x0, t, seed=0)["loss"]
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str = "eps",
        variance: str = "fixed_large",
        loss: str = "mse",
        weighting: Tensor | str | None = None,
        self_conditioning: bool = False,
    ) -> None:
        super().__init__(schedule, prediction, variance)
        check_name("loss", loss, losses.LOSSES)
        self.loss = loss
        self.self_conditioning = self_conditioning
        losses.check_loss(loss, variance, weighted=weighting is not None)
        self.weighting = validated_weighting(weighting, schedule, prediction, variance)
        self._cache = DeviceCache(self)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x0) (DDPM eqs. 6-7, Math §4).

        Returns
        -------
        tuple of Tensor
            The mean in x_t's dtype; the others float32, views of one value per sample.
        """
        self._check_t("q_posterior", x_t, t)
        tables = self.schedule.tables(x_t.device)
        return ops.posterior_mean_variance(
            x0,
            x_t,
            t,
            tables.posterior_coef_x0,
            tables.posterior_coef_x_t,
            tables.posterior_variance,
            tables.posterior_log_variance_clipped,
        )

    # ---------------------------------------------------------------- reverse process

    def p_mean_variance(
        self,
        model: Model,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> ReverseStep:
        """p(x_{t-1} | x_t) = N(mu~(x0_hat, x_t), sigma_t^2) (DDPM §3.2, Math §4-§5).

        Parameters
        ----------
        x_t
            (B, C, ...), floating point.
        t
            (B,) int64, 0-based timesteps.
        clip_denoised
            Clip the predicted x0 to [-1, 1].

        Returns
        -------
        ReverseStep
            `mean` in x_t's dtype; `pred_x0` and `pred_eps` in the wider of x_t's and the model's.

        Raises
        ------
        ValueError
            Model output that is not (B, C, ...), or (B, 2C, ...) for learned variances.
        """
        self._check_t("p_mean_variance", x_t, t)
        output, extra = self.split_output(
            model(x_t, self.model_times(t), **(model_kwargs or {})), x_t
        )
        # x_t may be wider than a half-precision model; what is computed from both stays as wide.
        output = output.to(torch.promote_types(output.dtype, x_t.dtype))
        schedule = self.schedule
        pred_x0 = convert(schedule, self.prediction, "x0", output, x_t, t)
        if clip_denoised:
            pred_x0 = pred_x0.clamp(-1, 1)
            pred_eps = convert(schedule, "x0", "eps", pred_x0, x_t, t)
        else:
            pred_eps = convert(schedule, self.prediction, "eps", output, x_t, t)
        if self.prediction == "mean" and not clip_denoised:
            mean = output.to(x_t.dtype)
        else:
            mean = self.q_posterior(pred_x0, x_t, t)[0]
        variance, log_variance = self._variance(extra, x_t, t)
        return ReverseStep(mean, variance, log_variance, pred_x0, pred_eps)

    def _variance(self, extra: Tensor | None, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        tables = self.schedule.tables(x_t.device)
        if extra is None:
            if self.variance == "fixed_large":
                variance, log_variance = tables.beta, tables.log_beta
            else:
                variance = tables.posterior_variance
                log_variance = tables.posterior_log_variance_clipped
            return (
                per_sample(variance, t, x_t).expand_as(x_t),
                per_sample(log_variance, t, x_t).expand_as(x_t),
            )
        log_variance = extra.float()
        if self.variance == "learned_range":
            upper = per_sample(tables.log_beta, t, x_t)
            lower = per_sample(tables.posterior_log_variance_clipped, t, x_t)
            log_variance = (upper + lower) / 2 + (upper - lower) / 2 * log_variance
        return log_variance.exp(), log_variance

    # ---------------------------------------------------------------- training

    def training_losses(
        self,
        model: Model,
        x0: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        stream: int = 0,
        flip: Tensor | None = None,
        self_condition: bool = False,
    ) -> dict[str, Tensor]:
        """Per-sample losses at x_t ~ q(x_t | x0) (DDPM algorithm 1, Math §6).

        Parameters
        ----------
        x0
            (B, C, ...): pixels in [-1, 1], or uint8 levels, scaled inside.
        t
            (B,) int64, 0-based timesteps.
        noise, seed, stream
            As in `q_sample`; a seed gives the loss of the noise it stands for, which for
            eps-prediction is made again in the loss's kernels and never stored.
        flip
            (B,) bool: mirror these samples of x0.
        self_condition
            First let the model estimate x0, without gradients, and give it that as `x_self_cond`:
            for half of the steps in which a self-conditioned network is trained.

        Returns
        -------
        dict
            "loss" (B,) float32, to be averaged and differentiated; and what it is made of, before
            weighting and scaling: "mse" ("l1", "huber"), and "vb", the term of the bound at t in
            bits/dim.

        Raises
        ------
        ValueError
            Model output of the wrong shape, or a loss that cannot train `variance`.
        """
        if self.learns_variance and self.loss not in losses.TRAIN_VARIANCE:
            raise ValueError(
                f"loss={self.loss!r} gives no gradient to the variance channels of "
                f"variance={self.variance!r}; train with "
                f"loss={' or '.join(map(repr, sorted(losses.TRAIN_VARIANCE)))}, or a fixed variance"
            )
        check_tensors("training_losses", x0=x0, t=t)
        if noise is None and seed is None:
            seed = draw_keys(x0)
        x_t = self.q_sample(x0, t, noise, seed, stream=stream, flip=flip)
        model_kwargs = dict(model_kwargs or {})
        if self_condition:
            model_kwargs["x_self_cond"] = self._estimate_x0(model, x_t, t, model_kwargs)
        model_output = model(x_t, self.model_times(t), **model_kwargs)
        output, _ = self.split_output(model_output, x_t)
        weight = None
        if self.weighting is not None:
            weight = self._cache.get(_float32_weighting, t.device)[t]
        return losses.LOSSES[self.loss](
            losses.LossInputs(
                self, x0, x_t, t, noise, seed, stream, flip, model_output, output, weight
            )
        )

    @torch.no_grad()
    def _estimate_x0(
        self, model: Model, x_t: Tensor, t: Tensor, model_kwargs: Mapping[str, Any]
    ) -> Tensor:
        output, _ = self.split_output(model(x_t, self.model_times(t), **model_kwargs), x_t)
        return convert(self.schedule, self.prediction, "x0", output, x_t, t).clamp(-1, 1)

    bits_per_dim = bound.bits_per_dim
    q_step = forward_steps.q_step
    q_step_given_x0 = forward_steps.q_step_given_x0

    def _check_t(self, caller: str, x_t: Tensor, t: Tensor) -> None:
        """t must be int64 (B,) where x_t is; its range is checked where that does not wait."""
        check_tensors(caller, x_t=x_t, t=t)
        if t.dtype != torch.int64:
            raise TypeError(f"{caller}: t has dtype {t.dtype}, expected torch.int64")
        if tuple(t.shape) != (len(x_t),) or t.device != x_t.device:
            raise ValueError(
                f"{caller}: t has shape {tuple(t.shape)} on {t.device}, expected ({len(x_t)},) on "
                f"{x_t.device}, one timestep per sample"
            )
        if t.device.type != "cpu" or torch.compiler.is_compiling():
            return
        bad = (t < 0) | (t >= self.num_timesteps)
        if type(bad) is Tensor and bool(bad.any()):  # a FakeTensor has no values
            raise IndexError(
                f"{caller}: t has values from {int(t.min())} to {int(t.max())}, expected "
                f"0 <= t < {self.num_timesteps}"
            )

    def __repr__(self) -> str:
        return (
            f"GaussianDiffusion({self.schedule!r}, prediction={self.prediction!r}, "
            f"variance={self.variance!r}, loss={self.loss!r})"
        )


def _float32_weighting(diffusion: GaussianDiffusion, device: torch.device) -> Tensor:
    return diffusion.weighting.to(device, torch.float32)
