"""Heun's second-order method on DDIM's ODE (DDIM eq. 14; EDM algorithm 1, Math §7)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.step_tables import conversion_table, encode_indices
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers.base import Run
from fastdiff.samplers.ode import OdeSampler
from fastdiff.samplers.resolution import trapezoid


class Heun(OdeSampler):
    """xb' = xb_t + h eps(x_t, t);  xb_s = xb_t + h/2 [eps(x_t, t) + eps(x', s)],  h = sg_s - sg_t.

    The trapezoidal rule in the time variable sg_t = sqrt((1 - abar_t) / abar_t) of DDIM's Euler
    step: second order, two model evaluations per step. The last step ends at sg = 0, where no
    network can be asked, and is Euler's (as in EDM): 2 S - 1 evaluations in all.

    A step whose noise falls to less than a third is Euler's too, noise being sqrt(sg^2 + 1/4), with
    1/2 the data's standard deviation. The corrector would extrapolate there, by (sg_t / sg_s - 1) /
    2 times the difference of two predictions of x0, which at the noisy end of a cosine schedule is
    hundreds of times a network's error.

    Parameters are those of `OdeSampler`.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> sampler = fastdiff.samplers.Heun(diffusion, steps=10, spacing="logsnr")
    >>> images = sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8), progress=False)
    """

    @cached_property
    def _corrected(self) -> list[bool]:
        return trapezoid(self.diffusion.schedule, self.indices).tolist()

    def _table(self) -> Tensor:
        return heun_table(self.diffusion.schedule, self.indices)

    def _encode_table(self) -> Tensor:
        return heun_encode_table(self.diffusion.schedule, self.indices)

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        if not self._corrected[row]:
            return self._update(run, x, run.evaluate(x, row), row)
        return self._trapezoid(run, x, row, self.clip_denoised)

    def _encode_step(
        self, run: Run, x: Tensor, row: int, stream: int
    ) -> tuple[Tensor, Tensor | None]:
        return self._trapezoid(run, x, row, clip=False)

    def _trapezoid(self, run: Run, x: Tensor, row: int, clip: bool) -> tuple[Tensor, Tensor | None]:
        first = run.evaluate(x, row)
        predicted, pred_x0 = self._update(run, x, first, row, clip=clip)
        halfway, _ = self._update(run, x, first, self.steps + row, clip=clip)
        second = run.evaluate(predicted, 2 * self.steps + row)
        corrector = 2 * self.steps + row
        return self._update(run, predicted, second, corrector, extra=halfway, clip=clip)[0], pred_x0


@torch.no_grad()
def heun_table(schedule: NoiseSchedule, indices: Tensor) -> Tensor:
    """Three blocks of S rows: the whole Euler step, half of it, and the corrector's other half.

    With h = sg_s - sg_t and xb = x / sqrt(abar), in the order that a step uses them:

        whole      xb'      = xb_t + h eps(x_t, t)
        half       xb_half  = xb_t + h/2 eps(x_t, t)
        corrector  xb_s     = xb_half + h/2 eps(x', s)    with xb_half as the extra state
    """
    spaced = schedule.respace(indices)
    a_s, level_s = spaced.alpha_bars_prev.sqrt(), spaced.one_minus_alpha_bars_prev.sqrt()
    slope = level_s - a_s * spaced.snr.rsqrt()  # sqrt(abar_s) (sg_s - sg_t)
    table = _blocks(schedule, indices, encode_indices(indices), 1 / spaced.alphas.sqrt(), slope)
    c = StepColumn
    # Euler's step again, in the form that does not cancel in float32 if it is a long one.
    euler = torch.stack([a_s, torch.zeros_like(a_s), level_s], 1)
    whole = table[: len(indices), [c.COEF_X0, c.COEF_X_T, c.COEF_EPS]]
    table[: len(indices), [c.COEF_X0, c.COEF_X_T, c.COEF_EPS]] = torch.where(
        trapezoid(schedule, indices)[:, None], whole, euler
    )
    return table.float()


@torch.no_grad()
def heun_encode_table(schedule: NoiseSchedule, indices: Tensor) -> Tensor:
    """The same from s to t. From clean data eps is taken at index 0, as in `ddim_encode_table`."""
    spaced = schedule.respace(indices)
    ratio = spaced.alphas.sqrt()
    noise_t, noise_s = spaced.sqrt_one_minus_alpha_bars, spaced.one_minus_alpha_bars_prev.sqrt()
    slope = spaced.betas / (noise_t + ratio * noise_s)  # sqrt(abar_t) (sg_t - sg_s)
    return _blocks(schedule, encode_indices(indices), indices, ratio, slope).float()


def _blocks(
    schedule: NoiseSchedule, start: Tensor, end: Tensor, ratio: Tensor, slope: Tensor
) -> Tensor:
    c = StepColumn
    whole, half = (conversion_table(schedule, start) for _ in range(2))
    corrector = conversion_table(schedule, end)
    whole[:, c.COEF_X_T] = half[:, c.COEF_X_T] = ratio
    whole[:, c.COEF_EPS] = slope
    half[:, c.COEF_EPS] = corrector[:, c.COEF_EPS] = slope / 2
    corrector[:, c.COEF_EXTRA] = 1.0  # of the half step
    return torch.cat([whole, half, corrector])
