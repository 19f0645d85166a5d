"""Denoising diffusion implicit models (DDIM eq. 12, Math §7)."""

from __future__ import annotations

from torch import Tensor

from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.samplers.base import Run, Sampler
from fastdiff.samplers.spacing import Spacing


class DDIM(Sampler):
    """x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps + sigma z (DDIM eq. 12, Math §7).

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

    default_steps = 50

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

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        stream_or_none = None if self.deterministic else stream
        return self._update(run, x, run.evaluate(x, row), row, stream=stream_or_none)

    def _encode_table(self) -> Tensor:
        return self.diffusion.schedule.ddim_encode_table(self.indices)

    def _randomness(self) -> str:
        return f"has eta={self.eta:g}, sigma_hat={self.sigma_hat}"
