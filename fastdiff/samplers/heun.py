"""Heun's second-order method on DDIM's ODE (DDIM eq. 14; EDM algorithm 1, Math §7)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.step_tables import conversion_table, encode_indices
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers.base import Run
from fastdiff.samplers.ode import OdeSampler


class Heun(OdeSampler):
    """xb' = xb_t + h eps(x_t, t);  xb_s = xb_t + h/2 [eps(x_t, t) + eps(x', s)],  h = sg_s - sg_t.

    The trapezoidal rule in the time variable sg_t = sqrt((1 - abar_t) / abar_t) of DDIM's Euler
    step: second order, two model evaluations per step. The last step ends at sg = 0, where no
    network can be asked, and is Euler's (as in EDM): 2 S - 1 evaluations in all.

    Parameters are those of `OdeSampler`.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> sampler = fastdiff.samplers.Heun(diffusion, steps=10, spacing="logsnr")
    >>> images = sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8), progress=False)
    """

    def _table(self) -> Tensor:
        return heun_table(self.diffusion.schedule, self.indices)

    def _encode_table(self) -> Tensor:
        return heun_encode_table(self.diffusion.schedule, self.indices)

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        if row == 0:
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
    table[0, [c.COEF_X0, c.COEF_X_T, c.COEF_EPS]] = torch.tensor([1.0, 0, 0], dtype=torch.float64)
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
