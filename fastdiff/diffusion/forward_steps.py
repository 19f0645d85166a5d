"""Other forward steps than x0 -> x_t: one step, DDIM's non-Markovian one, real-valued time (§3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._types import check_tensors
from fastdiff.diffusion.process import Process, draw_keys
from fastdiff.diffusion.schedules import NoiseSchedule


def q_step(
    diffusion: Process,
    x: Tensor,
    t: Tensor,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    *,
    stream: int = 0,
) -> Tensor:
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise: q(x_t | x_{t-1}) (DDPM eq. 2, Math §3).

    Parameters
    ----------
    x
        x_{t-1}, (B, C, ...); x0 for t = 0.
    t
        (B,) int64, the 0-based timestep that the step leads to.
    noise, seed, stream
        As for `q_sample`.
    """
    check_tensors("q_step", x=x, t=t)
    schedule = diffusion.schedule
    keep = schedule.on_device(_sqrt_alphas, x.device)
    scale = schedule.on_device(_sqrt_betas, x.device)
    if noise is None and seed is None:
        seed = draw_keys(x)
    return ops.q_sample(x, t, keep, scale, noise, seed=seed, stream=stream)


def q_step_given_x0(
    diffusion: Process,
    x: Tensor,
    x0: Tensor,
    t: Tensor,
    eta: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    *,
    stream: int = 0,
) -> Tensor:
    """q_sigma(x_t | x_{t-1}, x0), DDIM's non-Markovian forward step (DDIM eq. 8, Math §3).

    N(sqrt(abar_t) x0 + s_t c / s^2 (x_{t-1} - sqrt(abar_{t-1}) x0), (sigma s_t / s)^2 I) with s^2 =
    1 - abar_{t-1}, s_t^2 = 1 - abar_t, c^2 = s^2 - sigma^2 and sigma = eta times that of DDPM.
    eta = 1 is q(x_t | x_{t-1}), whatever x0; eta = 0 has no noise.

    Parameters
    ----------
    x, x0
        x_{t-1} and x0, (B, C, ...).
    t
        (B,) int64, the 0-based timestep that the step leads to. For t = 0 it is q(x_1 | x0), which
        all members of the family share.
    eta
        0 to 1.
    noise, seed, stream
        As for `q_sample`.

    Raises
    ------
    ValueError
        eta outside [0, 1], or x0 of another shape than x.
    """
    check_tensors("q_step_given_x0", x=x, x0=x0, t=t)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected 0 (no noise) to 1 (the Markov chain's)")
    if x0.shape != x.shape:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}, expected {tuple(x.shape)} as x")
    if noise is None and seed is None:
        seed = draw_keys(x)
    of_x, of_x0, scale = _step_tables(diffusion.schedule, eta)
    at = t.cpu()
    shape = (-1, *[1] * (x.dim() - 1))
    # One op: its x0 is the mean, its signal scale 1.
    mean = of_x[at].to(x).view(shape) * x + of_x0[at].to(x).view(shape) * x0
    return ops.q_sample(
        mean,
        t,
        torch.ones_like(scale, dtype=torch.float32).to(x.device),
        scale.to(x.device, torch.float32),
        noise,
        seed=seed,
        stream=stream,
    )


def continuous_tables(schedule: NoiseSchedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar) at real times in [0, T], float64 (DDIM §4.2, Math §3).

    log abar is linear between whole times, that is beta(u) of the forward SDE is constant over a
    step: the reading of time of the reverse SDE (Math §7). `ops.q_sample` takes them as tables,
    with `t = arange(B)`.

    Parameters
    ----------
    times
        Any shape; time t = 1, 2, ..., T is index t - 1 of the schedule, 0 clean data.

    Raises
    ------
    ValueError
        A time outside [0, T], or beyond T - 1 on a schedule with zero terminal SNR.

    Examples
    --------
    >>> import torch, fastdiff
    >>> from fastdiff.diffusion.forward_steps import continuous_tables
    >>> schedule = fastdiff.NoiseSchedule.linear(1000)
    >>> signal, noise = continuous_tables(schedule, torch.tensor([0.0, 499.5, 1000.0]))
    >>> images = torch.zeros(3, 1, 8, 8)
    >>> x_t = fastdiff.ops.q_sample(images, torch.arange(3), signal.float(), noise.float(), seed=0)
    """
    check_tensors("continuous_tables", times=times)
    last = schedule.num_timesteps - schedule.has_zero_terminal_snr
    u = times.detach().cpu().double()
    if not bool(((u >= 0) & (u <= last)).all()):
        raise ValueError(f"times are from {float(u.min())} to {float(u.max())}, expected 0..{last}")
    log_alpha_bars = torch.cat([torch.zeros(1, dtype=torch.float64), schedule.log_alpha_bars])
    before = u.floor().clamp(max=last - 1).long()
    between = torch.lerp(log_alpha_bars[before], log_alpha_bars[before + 1], u - before)
    return (between / 2).exp(), (-torch.expm1(between)).sqrt()


def _sqrt_alphas(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    return schedule.alphas.sqrt().to(device, torch.float32)


def _sqrt_betas(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    return schedule.betas.sqrt().to(device, torch.float32)


@torch.no_grad()
def _step_tables(schedule: NoiseSchedule, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of x_{t-1} and x0, and the standard deviation, float64 (T,)."""
    noise_t, noise_s = schedule.one_minus_alpha_bars, schedule.one_minus_alpha_bars_prev
    # sigma^2 = eta^2 (noise_s / noise_t) beta, so sigma s_t / s = eta sqrt(beta), and s_t c / s^2 =
    # sqrt((noise_t - eta^2 beta) / noise_s), which for eta = 1 is sqrt(alpha).
    left = schedule.alphas * noise_s + (1 - eta**2) * schedule.betas  # without cancellation
    of_x = (left / noise_s).sqrt()
    of_x0 = schedule.sqrt_alpha_bars - of_x * schedule.alpha_bars_prev.sqrt()
    scale = eta * schedule.betas.sqrt()
    of_x[0], of_x0[0], scale[0] = 0.0, schedule.sqrt_alpha_bars[0], noise_t[0].sqrt()
    return of_x, of_x0, scale
