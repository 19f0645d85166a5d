"""What the deterministic samplers share: they follow DDIM's ODE (DDIM eqs. 13-14, Math §7)."""

from __future__ import annotations

from fastdiff.samplers.base import Sampler


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

    Raises
    ------
    ValueError
        Steps or spacing that do not fit the schedule, or a first noise level that is infinite (zero
        terminal SNR).
    """

    default_steps = 50
    deterministic = True
    finite_noise_level = True
