"""What the deterministic samplers share: they follow DDIM's ODE (DDIM eqs. 13-14, Math §7)."""

from __future__ import annotations

from fastdiff.gaussian import GaussianDiffusion
from fastdiff.samplers.base import Sampler
from fastdiff.samplers.spacing import Spacing


class OdeSampler(Sampler):
    """A solver of d xb = eps d sg with xb = x / sqrt(abar), sg = sqrt((1 - abar) / abar).

    Time enters through sg alone: a timestep stands for the noise level sg_t of the schedule, and
    sg = 0 before the first one. So any subsequence of any schedule is a grid of this ODE.

    Parameters
    ----------
    diffusion
        The process the model was trained on. A learned variance is not used.
    steps
        S; 50 by default, or what `spacing` says if that is a list or sections.
    spacing
        See `spaced_indices`.
    clip_denoised
        Clip the predicted x0 to [-1, 1] in every evaluation.
    eta
        Only 0: an ODE adds no noise.

    Raises
    ------
    ValueError
        eta other than 0, steps or spacing that do not fit the schedule, or a first noise level that
        is infinite (zero terminal SNR).
    """

    default_steps = 50
    deterministic = True
    finite_noise_level = True
    """Whether the first step needs sg_T to be finite."""

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        steps: int | None = None,
        spacing: Spacing = "leading",
        *,
        clip_denoised: bool = True,
        eta: float = 0.0,
    ) -> None:
        name = type(self).__name__
        if eta != 0:
            raise ValueError(
                f"eta is {eta}, but {name} follows an ODE, which adds no noise: leave eta out, or "
                "use DDIM(..., eta=...)"
            )
        super().__init__(diffusion, steps, spacing, clip_denoised=clip_denoised)
        if self.finite_noise_level:
            require_signal(self)


def require_signal(sampler: Sampler) -> None:
    """Raise if the last visited timestep has zero SNR, where the sampler's time is infinite."""
    schedule, last = sampler.diffusion.schedule, int(sampler.indices[-1])
    if last == schedule.num_timesteps - 1 and schedule.has_zero_terminal_snr:
        raise ValueError(
            f"{type(sampler).__name__} starts at a finite noise level, but timestep {last} of this "
            "schedule has zero SNR (abar = 0); leave it out of spacing, or use DDIM, DDPM or "
            "DPMSolverPP"
        )
