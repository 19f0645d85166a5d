"""Denoising diffusion implicit models (DDIM eq. 12, SPEC §7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.gaussian import GaussianDiffusion, Model
from fastdiff.guidance import Guidance
from fastdiff.samplers.base import Callback, Run, Sampler
from fastdiff.samplers.spacing import SPACINGS, Spacing
from fastdiff.step_tables import encode_indices


class DDIM(Sampler):
    """x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps + sigma z (DDIM eq. 12, SPEC §7).

    s is the previous visited timestep, for every spacing, and alpha_bar = 1 before the first.

    Parameters
    ----------
    diffusion
        The process the model was trained on. A learned variance is not used.
    steps
        S; 50 by default, or what `spacing` says if that is a list or sections.
    eta
        0: deterministic. 1: DDPM with beta~ (eq. 16).
    spacing
        See `spaced_indices`. DDIM's CIFAR-10 numbers need "quadratic".
    sigma_hat
        DDPM's larger noise at eta = 1 (app. D.3).
    clip_denoised
        Clip the predicted x0 to [-1, 1] in every step.
    use_clipped_model_output
        After clipping, recompute eps from the clipped x0 (else keep the model's).

    Raises
    ------
    ValueError
        eta outside [0, 1], steps or spacing that do not fit the schedule.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> sampler = fastdiff.samplers.DDIM(diffusion, steps=10)
    >>> images = sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8), progress=False)
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        steps: int | None = None,
        eta: float = 0.0,
        spacing: Spacing = "leading",
        *,
        sigma_hat: bool = False,
        clip_denoised: bool = True,
        use_clipped_model_output: bool = True,
    ) -> None:
        if steps is None and isinstance(spacing, str) and spacing in SPACINGS:
            steps = 50
        super().__init__(diffusion, steps, spacing, clip_denoised=clip_denoised)
        self.eta = eta
        self.sigma_hat = sigma_hat
        self.use_clipped_model_output = use_clipped_model_output
        self._steps_table = diffusion.schedule.ddim_table(self.indices, eta, sigma_hat)

    @property
    def deterministic(self) -> bool:
        """Whether x_T alone decides the sample."""
        return self.eta == 0 and not self.sigma_hat

    def _table(self) -> Tensor:
        return self._steps_table

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor]:
        output, uncond, scale = run.evaluate(x, row)
        return ops.ddim_step(
            x,
            output,
            run.rows[row],
            run.table,
            prediction=self.diffusion.prediction,
            clip=self.clip_denoised,
            use_clipped_model_output=self.use_clipped_model_output,
            uncond=uncond,
            guidance_scale=scale,
            seed=None if self.deterministic else run.keys,
            stream=stream,
            return_pred_x0=True,
        )

    @torch.no_grad()
    def encode(
        self,
        model: Model,
        x0: Tensor,
        guidance: Guidance | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> Tensor:
        """x_T from which `sample(model, x_T=x_T)` reconstructs x0 (DDIM eqs. 13-14, §5.4, SPEC §7).

        The same ODE run forward over the same timesteps, without clipping; the reconstruction error
        falls as 1/S. For the closest one, decode with `clip_denoised=False` too.

        Parameters
        ----------
        x0
            (B, C, ...), pixels in [-1, 1].
        callback
            Called as `callback(step, t, x_t, pred_x0)` with the t at which the model was evaluated.

        Returns
        -------
        Tensor
            x_T, shape and dtype of x0.

        Raises
        ------
        ValueError
            A sampler that is not deterministic: only eta = 0 can be run backwards.
        """
        if not self.deterministic:
            raise ValueError(
                f"encode needs a deterministic sampler, this one has eta={self.eta:g}, "
                f"sigma_hat={self.sigma_hat}; use DDIM(..., eta=0.0)"
            )
        if not x0.is_floating_point() or x0.dim() < 2:
            raise ValueError(
                f"x0 has shape {tuple(x0.shape)} and dtype {x0.dtype}, expected (B, C, ...) of a "
                "floating-point dtype with pixels in [-1, 1]"
            )
        table = self.diffusion.schedule.ddim_encode_table(self.indices)
        evaluated = encode_indices(self.indices)
        run = self._run(model, x0, table, evaluated, None, guidance, model_kwargs)
        times = self.diffusion.schedule.timesteps[evaluated]
        return self._loop(
            model,
            run,
            x0.detach(),
            range(self.steps),
            self._encode_step,
            times,
            progress,
            callback,
        )

    def _encode_step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor]:
        output, uncond, scale = run.evaluate(x, row)
        return ops.ddim_step(
            x,
            output,
            run.rows[row],
            run.table,
            prediction=self.diffusion.prediction,
            clip=False,
            uncond=uncond,
            guidance_scale=scale,
            return_pred_x0=True,
        )
