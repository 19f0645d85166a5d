"""Weights of the training error at every timestep (Math §6).

A weight says how much an error of x0 counts. Errors of the same prediction in other terms differ by
a factor per timestep, so one rule gives each prediction its right form: min-SNR's min(SNR, gamma)
is min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.step_columns import PREDICTIONS

# Weight of a squared error of x0, from SNR = abar / (1 - abar) and min-SNR's gamma.
_X0_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma),
    "snr": lambda snr, gamma: snr,
    "snr_plus_one": lambda snr, gamma: snr + 1,
    "truncated_snr": lambda snr, gamma: snr.clamp(min=1),
    "p2": lambda snr, gamma: snr / (1 + snr),
}

WEIGHTINGS = (*_X0_WEIGHTS, "exact")
"""Names that `weights` knows."""


@torch.no_grad()
def weights(
    name: str,
    schedule: NoiseSchedule,
    prediction: str = "eps",
    *,
    variance: str = "fixed_large",
    gamma: float = 5.0,
) -> Tensor:
    """Weight of the squared error of `prediction` at every t, (T,) float64 (Math §6).

    Parameters
    ----------
    name
        What an error of x0 counts: "min_snr": min(SNR, gamma) (Hang et al. 2023); "snr": SNR, as
        the unweighted error of eps; "snr_plus_one": SNR + 1, as that of v; "truncated_snr":
        max(SNR, 1) (Salimans & Ho 2022); "p2": SNR / (1 + SNR) (Choi et al. 2022, k = gamma = 1);
        "exact": as in the bound, so that T times the weighted error is it, in nats per dimension,
        up to a constant (DDPM eq. 12).
    prediction
        "eps", "x0", "v" or "mean".
    variance
        Of "exact": "fixed_large" or "fixed_small" (at t = 1 that of t = 2, instead of 0).
    gamma
        Of "min_snr".

    Raises
    ------
    ValueError
        Unknown names, gamma that is not positive, or "exact" with a learned variance.

    Examples
    --------
    >>> import fastdiff
    >>> from fastdiff.diffusion.weightings import weights
    >>> schedule = fastdiff.NoiseSchedule.cosine(1000)
    >>> diffusion = fastdiff.GaussianDiffusion(
    ...     schedule, prediction="v", weighting=weights("min_snr", schedule, "v", gamma=3.0)
    ... )
    """
    for what, value, known in (
        ("weighting", name, WEIGHTINGS),
        ("prediction", prediction, PREDICTIONS),
    ):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(known)}")
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma}, expected a positive number")
    if name == "exact":
        weight = schedule.posterior_mean_coef_x0.square() / (2 * _fixed(schedule, variance))
    else:
        weight = _X0_WEIGHTS[name](schedule.snr, gamma)
    if prediction == "eps":
        return weight / schedule.snr
    if prediction == "v":
        return weight * schedule.one_minus_alpha_bars
    if prediction == "mean":
        return weight / schedule.posterior_mean_coef_x0.square()
    return weight


@torch.no_grad()
def theorem1_gamma(schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """gamma_t with which J_sigma = L_gamma + C, (T,) float64 (DDIM theorem 1, Math §6).

    gamma_t = c_t^2 (1 - abar_t) / (2 sigma_t^2 abar_t), with c_t = sqrt(abar_s) -
    sqrt(1 - abar_s - sigma_t^2) sqrt(abar_t / (1 - abar_t)), s = t - 1, and c_1 = 1. In nats, for
    squared errors of eps summed over dimensions. (The paper prints the simplified
    1 / (2 d sigma_t^2 alpha_t).)

    Parameters
    ----------
    sigma
        (T,) standard deviations of q_sigma(x_s | x_t, x0), which p shares (DDIM eqs. 7 and 10);
        that of t = 1 belongs to p(x0 | x_1) alone.

    Raises
    ------
    ValueError
        A sigma that is not positive, or sigma_t^2 > 1 - abar_{t-1}, which no q_sigma has.
    """
    if tuple(sigma.shape) != tuple(schedule.betas.shape):
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)}, expected {tuple(schedule.betas.shape)}, one "
            "standard deviation per timestep"
        )
    variance = sigma.detach().to("cpu", torch.float64).square()
    left = schedule.one_minus_alpha_bars_prev - variance
    # DDPM's own sigma reaches the limit at t = 2 (sigma of t = 1: abar_0 = 1, nothing to share).
    impossible = ~(variance > 0) | (left < -1e-12 * variance)
    impossible[0] = not float(variance[0]) > 0
    if bool(impossible.any()):
        i = int(impossible.nonzero()[0])
        most = f" at most {float(schedule.one_minus_alpha_bars_prev[i]) ** 0.5:.6g}" if i else ""
        raise ValueError(f"sigma[{i}] is {float(sigma[i])}, expected a positive number{most}")
    c = schedule.alpha_bars_prev.sqrt() - left.clamp(min=0).sqrt() * schedule.snr.sqrt()
    return c.square() / (2 * variance * schedule.snr)


def validated_weighting(
    weighting: Tensor | str | None, schedule: NoiseSchedule, prediction: str, variance: str
) -> Tensor | None:
    """None, or (T,) weights: those of a name, or a copy of a tensor if finite and not negative.

    Raises
    ------
    ValueError
        Anything else.
    """
    if weighting is None:
        return None
    num_timesteps = schedule.num_timesteps
    if isinstance(weighting, str) and weighting in WEIGHTINGS:
        return weights(weighting, schedule, prediction, variance=variance)
    if not isinstance(weighting, Tensor):
        raise ValueError(
            f"unknown weighting {weighting!r}; choose None, {', '.join(WEIGHTINGS)}, or a tensor "
            f"({num_timesteps},)"
        )
    if tuple(weighting.shape) != (num_timesteps,):
        raise ValueError(
            f"weighting has shape {tuple(weighting.shape)}, expected ({num_timesteps},), one "
            "weight per timestep"
        )
    if not bool((weighting.isfinite() & (weighting >= 0)).all()):
        raise ValueError("weighting must be finite and not negative")
    return weighting.clone()


def _fixed(schedule: NoiseSchedule, variance: str) -> Tensor:
    if variance == "fixed_large":
        return schedule.betas
    if variance == "fixed_small":
        return schedule.posterior_log_variance_clipped.exp()
    raise ValueError(
        f"weighting 'exact' belongs to variance='fixed_large' or 'fixed_small', not {variance!r}"
    )
