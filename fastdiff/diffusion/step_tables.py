"""Per-step coefficient tables of the samplers (Math §7), built in float64 from a schedule.

Row i of a table belongs to indices[i], so row 0 is the least noisy step: the *last* one a sampler
executes (samplers walk the rows from S - 1 down to 0), and for the full sequence the row of a
sample is its t. The columns are `StepColumn`; a step reads its row and nothing else.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastdiff.reference.checks import shown
from fastdiff.reference.step_columns import NUM_STEP_COLUMNS, StepColumn

LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCES = ("fixed_large", "fixed_small", *LEARNED_VARIANCES)


class Schedule(Protocol):
    """What the tables read of a `NoiseSchedule`: its own tables (T,) in float64."""

    betas: Tensor
    alphas: Tensor
    alpha_bars_prev: Tensor
    one_minus_alpha_bars: Tensor
    one_minus_alpha_bars_prev: Tensor
    sqrt_alpha_bars: Tensor
    sqrt_one_minus_alpha_bars: Tensor
    posterior_mean_coef_x0: Tensor
    posterior_mean_coef_x_t: Tensor
    posterior_log_variance_clipped: Tensor
    timesteps: Tensor

    def respace(self, indices: Tensor) -> Schedule: ...


@torch.no_grad()
def ddpm_table(schedule: Schedule, indices: Tensor, variance: str = "fixed_large") -> Tensor:
    """Ancestral steps: x_s = mu~(x0, x_t) + sigma z on the respaced betas (DDPM alg. 2, Math §7).

    sigma^2 is beta (`fixed_large`), beta~ (`fixed_small`), or comes from the network's variance
    channels v: log sigma^2 = v (`learned`), or (log beta + log beta~)/2 + v (log beta - log
    beta~)/2 (`learned_range`, IDDPM eq. 15 with v in [-1, 1]).

    Returns
    -------
    Tensor
        (S, K) float32 on the CPU, columns `StepColumn`.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; choose from {', '.join(VARIANCES)}")
    c = StepColumn
    spaced = schedule.respace(indices)
    table = conversion_table(schedule, indices)
    table[:, c.COEF_X0] = spaced.posterior_mean_coef_x0
    table[:, c.COEF_X_T] = spaced.posterior_mean_coef_x_t
    upper, lower = spaced.betas.log(), spaced.posterior_log_variance_clipped
    if variance == "fixed_large":
        table[:, c.LOG_VARIANCE] = upper
    elif variance == "fixed_small":
        table[:, c.LOG_VARIANCE] = lower
    elif variance == "learned_range":
        table[:, c.LOG_VARIANCE] = (upper + lower) / 2
        table[:, c.LOG_VARIANCE_SLOPE] = (upper - lower) / 2
    else:
        table[:, c.LOG_VARIANCE_SLOPE] = 1.0
    table[:, c.POSTERIOR_LOG_VARIANCE] = lower
    table[:, c.SIGMA] = (table[:, c.LOG_VARIANCE] / 2).exp()
    table[0, c.SIGMA] = 0.0
    return table.float()


@torch.no_grad()
def ddim_table(
    schedule: Schedule, indices: Tensor, eta: float = 0.0, sigma_hat: bool = False
) -> Tensor:
    """DDIM steps: x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) eps + sigma z (DDIM eq. 12).

    sigma = eta sqrt((1 - abar_s)/(1 - abar_t)) sqrt(1 - abar_t/abar_s) (eq. 16, Math §7).

    Parameters
    ----------
    eta
        0 (deterministic) to 1 (DDPM with beta~).
    sigma_hat
        Noise sqrt(1 - abar_t/abar_s) while the direction keeps sigma(1) (DDIM app. D.3). It fixes
        eta; leave that at 0 or give 1.

    Returns
    -------
    Tensor
        (S, K) float32 on the CPU, columns `StepColumn`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {shown(eta)}, expected 0 (deterministic) to 1 (DDPM)")
    if sigma_hat and eta not in (0, 1):
        raise ValueError(f"sigma_hat=True goes with eta=1, got eta={eta}")
    eta = 1.0 if sigma_hat else float(eta)
    c = StepColumn
    spaced = schedule.respace(indices)
    table = conversion_table(schedule, indices)
    noise_t, noise_s = spaced.one_minus_alpha_bars, spaced.one_minus_alpha_bars_prev
    # sigma(1)^2 = noise_s q with q = beta'/noise_t and 1 - q = alpha' noise_s/noise_t, so that
    # 1 - abar_s - sigma^2 = noise_s (1 - eta^2 q) is a sum of terms that are not negative.
    q = spaced.betas / noise_t
    keep = spaced.alphas * noise_s / noise_t
    table[:, c.COEF_X0] = spaced.alpha_bars_prev.sqrt()
    table[:, c.COEF_EPS] = (noise_s * (keep + (1 - eta**2) * q)).sqrt()
    table[:, c.SIGMA] = spaced.betas.sqrt() if sigma_hat else eta * (noise_s * q).sqrt()
    table[0, c.SIGMA] = 0.0
    return table.float()


@torch.no_grad()
def ddim_encode_table(schedule: Schedule, indices: Tensor) -> Tensor:
    """The DDIM ODE run forward, x0 -> x_T (DDIM eqs. 13-14, Math §7).

    x_t = R x_s + (sqrt(1-abar_t) - R sqrt(1-abar_s)) eps(x_s), R = sqrt(abar_t/abar_s): the
    Euler step that `ddim_table` with eta = 0 takes, the other way. Row i leads to indices[i] and
    is evaluated at indices[i-1]; row 0 starts from clean data (abar = 1), which no network has
    seen, and is evaluated at index 0, the least noisy one that it has. Rows are executed from 0 up.

    Returns
    -------
    Tensor
        (S, K) float32 on the CPU, columns `StepColumn`; TIMESTEP is where to evaluate.
    """
    c = StepColumn
    spaced = schedule.respace(indices)
    table = conversion_table(schedule, encode_indices(indices))
    ratio = spaced.alphas.sqrt()
    noise_t, noise_s = spaced.sqrt_one_minus_alpha_bars, spaced.one_minus_alpha_bars_prev.sqrt()
    table[:, c.COEF_X_T] = ratio
    # noise_t - ratio noise_s, by the difference of squares.
    table[:, c.COEF_EPS] = spaced.betas / (noise_t + ratio * noise_s)
    return table.float()


def encode_indices(indices: Tensor) -> Tensor:
    """Where each row of `ddim_encode_table` evaluates the network."""
    return torch.cat([indices.new_zeros(1), indices[:-1]])


def conversion_table(schedule: Schedule, indices: Tensor) -> Tensor:
    """A float64 table with the columns that turn a model output into x0 and eps (Math §5)."""
    c = StepColumn
    table = torch.zeros(len(indices), NUM_STEP_COLUMNS, dtype=torch.float64)
    a = schedule.sqrt_alpha_bars[indices]
    s = schedule.sqrt_one_minus_alpha_bars[indices]
    c0 = schedule.posterior_mean_coef_x0[indices]
    table[:, c.SQRT_ALPHA_BAR] = a
    table[:, c.SQRT_ONE_MINUS_ALPHA_BAR] = s
    table[:, c.RECIP_SQRT_ALPHA_BAR] = 1 / a
    table[:, c.NOISE_TO_SIGNAL] = s / a
    table[:, c.RECIP_SQRT_ONE_MINUS_ALPHA_BAR] = 1 / s
    table[:, c.SIGNAL_TO_NOISE] = a / s
    table[:, c.X0_FROM_MEAN] = 1 / c0
    table[:, c.X0_FROM_MEAN_X_T] = schedule.posterior_mean_coef_x_t[indices] / c0
    table[:, c.TIMESTEP] = schedule.timesteps[indices].double()
    return table
