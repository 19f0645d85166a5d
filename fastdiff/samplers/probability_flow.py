"""Euler steps of the probability flow of the variance-exploding SDE (DDIM eq. 15, Math §7)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.step_tables import conversion_table, ddim_encode_table
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers.base import Run
from fastdiff.samplers.ode import OdeSampler
from fastdiff.samplers.resolution import euler_in_variance


class ProbabilityFlow(OdeSampler):
    """xb_s = xb_t + 1/2 (sg_s^2 - sg_t^2) / sg_t eps, xb = x / sqrt(abar) (DDIM eq. 15, Math §7).

    The same ODE as DDIM's, stepped in sg^2 instead of sg: both end at the same point as S grows,
    and with few steps DDIM is closer to it. Time is the schedule's noise level sg_t^2 = (1 -
    abar_t) / abar_t. In this variable the ODE is singular at sg = 0, where eq. 15 would leave half
    of the last noise level in the sample; the step that ends there is DDIM's.

    So are those at the noisy end that eq. 15 does not resolve. It leaves (1 + r^2) / 2 of the noise
    where r = sg_s / sg_t should be left; it is used up to the largest noise level from which its
    steps together leave Gaussian data of standard deviation 1/2 no more than twice its variance.
    With few steps all are DDIM's; as S grows all are eq. 15's but those in which the schedule
    itself jumps.

    Parameters are those of `OdeSampler`.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> sampler = fastdiff.samplers.ProbabilityFlow(diffusion, steps=10)
    >>> images = sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8), progress=False)
    """

    def _table(self) -> Tensor:
        return probability_flow_table(self.diffusion.schedule, self.indices)

    def _encode_table(self) -> Tensor:
        return probability_flow_encode_table(self.diffusion.schedule, self.indices)

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        return self._update(run, x, run.evaluate(x, row), row)


@torch.no_grad()
def probability_flow_table(schedule: NoiseSchedule, indices: Tensor) -> Tensor:
    """Rows x_s = sqrt(abar_s/abar_t) x_t + sqrt(abar_s) (sg_s^2 - sg_t^2) / (2 sg_t) eps."""
    c = StepColumn
    spaced = schedule.respace(indices)
    table = conversion_table(schedule, indices)
    a_s = spaced.alpha_bars_prev.sqrt()
    level_s = spaced.one_minus_alpha_bars_prev / spaced.alpha_bars_prev
    level_t = 1 / spaced.snr
    table[:, c.COEF_X_T] = 1 / spaced.alphas.sqrt()
    table[:, c.COEF_EPS] = a_s * (level_s - level_t) / (2 * level_t.sqrt())
    ddim = ~euler_in_variance(schedule, indices)
    ddim_step = torch.stack(
        [a_s, torch.zeros_like(a_s), spaced.one_minus_alpha_bars_prev.sqrt()], 1
    )
    columns = [c.COEF_X0, c.COEF_X_T, c.COEF_EPS]
    table[:, columns] = torch.where(ddim[:, None], ddim_step, table[:, columns])
    return table.float()


@torch.no_grad()
def probability_flow_encode_table(schedule: NoiseSchedule, indices: Tensor) -> Tensor:
    """The same steps from s to t, with eps at s; DDIM's where those of the way back are."""
    c = StepColumn
    spaced = schedule.respace(indices)
    table = ddim_encode_table(schedule, indices).double()
    level = 1 / spaced.snr
    step = (level[1:] - level[:-1]) / (2 * level[:-1].sqrt())
    euler = euler_in_variance(schedule, indices)[1:]
    table[1:, c.COEF_EPS] = torch.where(
        euler, spaced.sqrt_alpha_bars[1:] * step, table[1:, c.COEF_EPS]
    )
    return table.float()
