"""Noise schedules (Math §2) and every table that follows from the betas (Math §1-§4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff._device_cache import DeviceCache, Value
from fastdiff._types import check_name
from fastdiff.diffusion import step_tables
from fastdiff.diffusion._schedule_checks import (
    Indices,
    as_indices,
    validated_betas,
    validated_length,
)


@dataclass(frozen=True)
class ScheduleTables:
    """Float32 tables (T,) on one device, as the ops read them; `timesteps` is int64.

    `posterior_coef_x0` and `posterior_coef_x_t` give the posterior mean (DDPM eq. 7).
    """

    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    beta: Tensor
    log_beta: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_coef_x0: Tensor
    posterior_coef_x_t: Tensor
    timesteps: Tensor


class NoiseSchedule:
    """The variances beta_1..beta_T of the forward process and all that follows from them.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM eq. 2, Math §3).

    All tables are float64 tensors (T,) on the CPU, index i = t - 1; `tables(device)` gives the
    float32 copies that kernels read. 1 - abar is never computed by subtraction.

    Parameters
    ----------
    betas
        (T,) tensor, array or sequence with values in (0, 1]. A tensor that requires grad stays
        differentiable (learned variances, DDPM §2): build the schedule again after each optimizer
        step. Gradients need betas < 1.
    timesteps
        (T,) the indices a network is fed for each entry; default 0..T-1. `respace` sets them.

    Raises
    ------
    TypeError, ValueError
        Betas that are not numbers, not 1-D, empty, not finite, or outside (0, 1].

    Examples
    --------
    >>> import fastdiff
    >>> schedule = fastdiff.NoiseSchedule.linear(1000)
    >>> round(float(schedule.alpha_bars[-1]), 7)
    4.04e-05
    """

    def __init__(
        self,
        betas: Tensor | np.ndarray | Sequence[float],
        *,
        timesteps: Indices | None = None,
    ) -> None:
        self.betas = validated_betas(betas)
        if timesteps is None:
            self.timesteps = torch.arange(len(self.betas))
        else:
            self.timesteps = as_indices(timesteps, name="timesteps")
            if len(self.timesteps) != len(self.betas):
                raise ValueError(
                    f"timesteps has {len(self.timesteps)} entries, expected {len(self.betas)}, "
                    "one per beta"
                )
        self._derive(torch.log1p(-self.betas))
        self._cache = DeviceCache(self)

    def _derive(self, log_alphas: Tensor) -> None:
        """Every float64 table, (T,) on the CPU.

        At once: a table first computed under `FakeTensorMode` would stay fake, and one first
        computed under `torch.no_grad` would stay cut off from learned betas.
        """
        self.log_alphas = log_alphas
        """log alpha_t; -inf where beta is 1."""
        self.alphas = log_alphas.exp()
        """alpha_t = 1 - beta_t."""
        self.log_alpha_bars = log_alphas.cumsum(0)
        """log abar_t."""
        self.alpha_bars = self.log_alpha_bars.exp()
        """abar_t = prod_{s <= t} alpha_s."""
        self.alpha_bars_prev = torch.cat([self.betas.new_ones(1), self.alpha_bars[:-1]])
        """abar_{t-1}; 1 before the first step."""
        self.one_minus_alpha_bars = -torch.expm1(self.log_alpha_bars)
        """1 - abar_t."""
        self.one_minus_alpha_bars_prev = torch.cat(
            [self.betas.new_zeros(1), self.one_minus_alpha_bars[:-1]]
        )
        """1 - abar_{t-1}; 0 before the first step."""
        self.sqrt_alpha_bars = (0.5 * self.log_alpha_bars).exp()
        """sqrt(abar_t), the signal's scale in x_t."""
        self.sqrt_one_minus_alpha_bars = self.one_minus_alpha_bars.sqrt()
        """sqrt(1 - abar_t), the noise's scale in x_t."""
        ratio = self.one_minus_alpha_bars_prev / self.one_minus_alpha_bars
        self.posterior_variance = ratio * self.betas
        """beta~_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t (DDPM eq. 7); 0 at t = 1."""
        first = self.posterior_variance[1:2] if len(self.betas) > 1 else self.betas
        self.posterior_log_variance_clipped = torch.cat([first, self.posterior_variance[1:]]).log()
        """log beta~_t, with the value of t = 2 at t = 1 (of log beta_1 if T = 1) (Math §4)."""
        sqrt_alpha_bars_prev = torch.cat([self.betas.new_ones(1), self.sqrt_alpha_bars[:-1]])
        self.posterior_mean_coef_x0 = sqrt_alpha_bars_prev * self.betas / self.one_minus_alpha_bars
        """sqrt(abar_{t-1}) beta_t / (1 - abar_t) (DDPM eq. 7)."""
        self.posterior_mean_coef_x_t = self.alphas.sqrt() * ratio
        """sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) (DDPM eq. 7)."""
        self.snr = self.alpha_bars / self.one_minus_alpha_bars
        """Signal-to-noise ratio abar_t / (1 - abar_t)."""

    # ---------------------------------------------------------------- constructors

    @classmethod
    def linear(
        cls,
        num_timesteps: int = 1000,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rescale: bool = False,
    ) -> NoiseSchedule:
        """beta evenly spaced from beta_start to beta_end (DDPM §4, Math §2).

        `rescale=True` multiplies both ends by 1000 / T, so that any T ends at about the same
        abar_T (IDDPM's code); it needs T >= 1000 beta_end.
        """
        num_timesteps = validated_length(num_timesteps)
        scale = 1000 / num_timesteps if rescale else 1.0
        start, end = beta_start * scale, beta_end * scale
        if rescale and not max(start, end) <= 1:
            raise ValueError(
                f"rescale=True makes beta {max(start, end):g} > 1 with T={num_timesteps}; "
                f"expected T >= {math.ceil(1000 * max(beta_start, beta_end))}"
            )
        return cls(_linspace(start, end, num_timesteps))

    @classmethod
    def quadratic(
        cls, num_timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """sqrt(beta) evenly spaced; `scaled_linear` elsewhere (Math §2)."""
        num_timesteps = validated_length(num_timesteps)
        return cls(_linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2)

    @classmethod
    def constant(cls, num_timesteps: int = 1000, *, beta_end: float = 0.02) -> NoiseSchedule:
        """beta = beta_end (Math §2)."""
        return cls(torch.full((validated_length(num_timesteps),), beta_end, dtype=torch.float64))

    @classmethod
    def jsd(cls, num_timesteps: int = 1000) -> NoiseSchedule:
        """beta_t = 1 / (T - t + 1) (Math §2): abar_t = 1 - t / T, so the last beta is 1."""
        num_timesteps = validated_length(num_timesteps)
        return cls(1 / torch.arange(num_timesteps, 0, -1, dtype=torch.float64))

    @classmethod
    def sigmoid(
        cls, num_timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """beta = beta_start + (beta_end - beta_start) sigmoid(linspace(-6, 6, T)) (Math §2)."""
        ramp = _linspace(-6, 6, validated_length(num_timesteps)).sigmoid()
        return cls(beta_start + (beta_end - beta_start) * ramp)

    @classmethod
    def cosine(
        cls, num_timesteps: int = 1000, *, s: float = 0.008, max_beta: float = 0.999
    ) -> NoiseSchedule:
        """abar(u) = cos^2((u + s)/(1 + s) pi/2), beta_t <= max_beta (IDDPM eq. 17, Math §2)."""
        num_timesteps = validated_length(num_timesteps)
        u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        angle = (u + s) / (1 + s) * (math.pi / 2)
        before, after = angle[:-1], angle[1:]
        # 1 - cos^2(after)/cos^2(before) without the cancellation.
        betas = (after - before).sin() * (after + before).sin() / before.cos() ** 2
        return cls(betas.clamp(max=max_beta))

    @classmethod
    def from_name(cls, name: str, num_timesteps: int = 1000, **options: Any) -> NoiseSchedule:
        """The schedule called `name`, with that constructor's options.

        Raises
        ------
        ValueError
            Unknown name; the message lists the known ones.
        """
        check_name("schedule", name, SCHEDULES)
        return getattr(cls, SCHEDULES[name])(num_timesteps, **options)

    # ---------------------------------------------------------------- summaries

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    def __len__(self) -> int:
        return self.num_timesteps

    @property
    def terminal_snr(self) -> float:
        """The signal-to-noise ratio left at t = T; how far q(x_T | x0) is from N(0, I)."""
        return float(self.snr[-1].detach())

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether x_T holds no signal at all (as float32 sees it): eps cannot tell x0 there."""
        return float(self.sqrt_alpha_bars[-1].detach()) < torch.finfo(torch.float32).tiny

    def prior_kl(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x0) || N(0, I)) in bits per dimension (DDPM eq. 5, Math §6).

        = mean over elements of [abar_T (x0^2 - 1) - log(1 - abar_T)] / (2 ln 2).

        Parameters
        ----------
        x0
            (B, ...), pixels in [-1, 1].

        Returns
        -------
        Tensor
            (B,) float64.
        """
        alpha_bar = self.alpha_bars[-1].to(x0.device)
        square = x0.to(torch.float64).square().flatten(1).mean(1)
        return (alpha_bar * (square - 1) - torch.log1p(-alpha_bar)) / (2 * math.log(2))

    # ---------------------------------------------------------------- other schedules

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """sqrt(abar) shifted to end at 0 and scaled to keep its first value (Lin et al. 2023).

        Raises
        ------
        ValueError
            T = 1.
        """
        if self.num_timesteps == 1:
            raise ValueError("rescale_zero_terminal_snr needs T >= 2, this schedule has T = 1")
        root = self.sqrt_alpha_bars
        shifted = root - root[-1]
        # beta'_t = 1 - (shifted_t / shifted_{t-1})^2, with shifted_{t-1} - shifted_t written so
        # that it does not cancel. The scale drops out, except for beta_1, which is kept.
        drop = root[:-1] * -torch.expm1(0.5 * self.log_alphas[1:])
        betas = drop * (shifted[:-1] + shifted[1:]) / shifted[:-1].square()
        # Rounding may leave the last ratio an ulp away from the 1 that it is.
        betas = torch.cat([self.betas[:1], betas[:-1], torch.ones_like(betas[-1:])])
        return NoiseSchedule(betas, timesteps=self.timesteps)

    def respace(self, indices: Indices) -> NoiseSchedule:
        """The schedule of the subsequence `indices`: 1 - beta' = abar_t / abar_s (Math §7).

        s is the previous entry of `indices`, for every spacing. The result's `timesteps` are what
        the network is fed.

        Parameters
        ----------
        indices
            Strictly increasing indices in 0..T-1.
        """
        indices = as_indices(indices, limit=self.num_timesteps)
        # Sums over the spans between indices rather than differences of log abar: those would be
        # inf - inf once a beta is 1.
        span = torch.searchsorted(indices, torch.arange(int(indices[-1]) + 1))
        log_alphas = self.log_alphas[: len(span)]
        spans = log_alphas.new_zeros(len(indices)).index_add(0, span, log_alphas)
        spaced = NoiseSchedule(-torch.expm1(spans), timesteps=self.timesteps[indices])
        # A long span can leave an alpha' that 1 - beta' would round away.
        spaced._derive(spans)
        return spaced

    # ---------------------------------------------------------------- float32 tables on a device

    def tables(self, device: torch.device | str = "cpu") -> ScheduleTables:
        """The float32 tables on `device`, built once per device."""
        return self.on_device(_float32_tables, device)

    def on_device(
        self, build: Callable[..., Value], device: torch.device | str, *key: str
    ) -> Value:
        """`build(schedule, device, *key)`, remembered: no upload and no host sync per call.

        Tables of learned betas are built anew, because a graph can be walked only once.
        """
        if self.betas.requires_grad:
            return build(self, torch.device(device), *key)
        return self._cache.get(build, device, *key)

    def ddpm_table(
        self,
        indices: Indices | None = None,
        variance: str = "fixed_large",
        *,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Coefficients of the ancestral steps over `indices`; see `step_tables.ddpm_table`."""
        return step_tables.ddpm_table(self, self._indices(indices), variance).to(device)

    def ddim_table(
        self,
        indices: Indices | None = None,
        eta: float = 0.0,
        sigma_hat: bool = False,
        *,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Coefficients of the DDIM steps over `indices`; see `step_tables.ddim_table`."""
        return step_tables.ddim_table(self, self._indices(indices), eta, sigma_hat).to(device)

    def ddim_encode_table(
        self, indices: Indices | None = None, *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Coefficients of DDIM's ODE run forward; see `step_tables.ddim_encode_table`."""
        return step_tables.ddim_encode_table(self, self._indices(indices)).to(device)

    def _indices(self, indices: Indices | None) -> Tensor:
        if indices is None:
            return torch.arange(self.num_timesteps)
        return as_indices(indices, limit=self.num_timesteps)

    def __repr__(self) -> str:
        betas = self.betas.detach()
        return (
            f"NoiseSchedule(T={self.num_timesteps}, beta={float(betas[0]):.3g}.."
            f"{float(betas[-1]):.3g}, terminal_snr={self.terminal_snr:.3g})"
        )


SCHEDULES = {
    "linear": "linear",
    "quadratic": "quadratic",
    "scaled_linear": "quadratic",
    "constant": "constant",
    "jsd": "jsd",
    "sigmoid": "sigmoid",
    "cosine": "cosine",
}
"""Names that `NoiseSchedule.from_name` knows, and the constructor each one calls."""


def _float32_tables(schedule: NoiseSchedule, device: torch.device) -> ScheduleTables:
    def table(values: Tensor) -> Tensor:
        return values.to(device, torch.float32)

    return ScheduleTables(
        sqrt_alpha_bar=table(schedule.sqrt_alpha_bars),
        sqrt_one_minus_alpha_bar=table(schedule.sqrt_one_minus_alpha_bars),
        beta=table(schedule.betas),
        log_beta=table(schedule.betas.log()),
        posterior_variance=table(schedule.posterior_variance),
        posterior_log_variance_clipped=table(schedule.posterior_log_variance_clipped),
        posterior_coef_x0=table(schedule.posterior_mean_coef_x0),
        posterior_coef_x_t=table(schedule.posterior_mean_coef_x_t),
        timesteps=schedule.timesteps.to(device),
    )


def _linspace(start: float, end: float, num: int) -> Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64)
