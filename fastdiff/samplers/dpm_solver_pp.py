"""DPM-Solver++(2M): a second-order multistep method on DDIM's ODE (Math §7)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.step_tables import conversion_table, ddim_encode_table
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers.base import Run
from fastdiff.samplers.ode import OdeSampler
from fastdiff.samplers.spacing import Spacing


class DPMSolverPP(OdeSampler):
    """x_s = (sigma_s/sigma_t) x_t + a_s (1 - e^-h) D,  D = x0_t + (x0_t - x0_u) / (2 r).

    a = sqrt(abar), sigma = sqrt(1 - abar); time is the schedule's half log-SNR lambda =
    ln(a / sigma), h = lambda_s - lambda_t, u the timestep visited before t, r = (lambda_t -
    lambda_u) / h (Lu et al. 2022, arXiv 2211.01095, algorithm 2). Second order, one evaluation per
    step; made for spacing="logsnr", the default here. The first step has no history and the
    last one ends at lambda = infinity: both are first order, which is DDIM's step.

    Parameters are those of `OdeSampler`.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> sampler = fastdiff.samplers.DPMSolverPP(diffusion, steps=10)
    >>> images = sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8), progress=False)
    """

    finite_noise_level = False
    multistep = True

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        steps: int | None = None,
        spacing: Spacing = "logsnr",
        *,
        clip_denoised: bool = True,
    ) -> None:
        super().__init__(diffusion, steps, spacing, clip_denoised=clip_denoised)

    def _table(self) -> Tensor:
        return dpm_solver_pp_table(self.diffusion.schedule, self.indices)

    def _encode_table(self) -> Tensor:
        self._require_finite_noise_level()
        return dpm_solver_pp_encode_table(self.diffusion.schedule, self.indices)

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        return self._multistep(run, x, row, self.clip_denoised)

    def _encode_step(
        self, run: Run, x: Tensor, row: int, stream: int
    ) -> tuple[Tensor, Tensor | None]:
        return self._multistep(run, x, row, clip=False)

    def _multistep(self, run: Run, x: Tensor, row: int, clip: bool) -> tuple[Tensor, Tensor | None]:
        outputs = run.evaluate(x, row)
        x, pred_x0 = self._update(run, x, outputs, row, extra=run.memory.get("x0"), clip=clip)
        run.memory["x0"] = pred_x0
        return x, pred_x0


@torch.no_grad()
def dpm_solver_pp_table(schedule: NoiseSchedule, indices: Tensor) -> Tensor:
    """x_s = COEF_X_T x_t + COEF_X0 x0_t + COEF_EXTRA x0_u, with x0_u predicted one step before.

    D = x0_t + share (x0_t - x0_u) with share = 1 / (2 r), and x_s = ratio x_t + gain D.
    """
    spaced = schedule.respace(indices)
    table = conversion_table(schedule, indices)
    a_s, sigma_s = spaced.alpha_bars_prev.sqrt(), spaced.one_minus_alpha_bars_prev.sqrt()
    ratio = sigma_s / spaced.sqrt_one_minus_alpha_bars
    # a_s (1 - e^-h) with e^-h = sg_s / sg_t, which is 0 at the last step.
    gain = a_s - ratio * spaced.sqrt_alpha_bars
    half_log_snr = spaced.snr.log() / 2
    step = half_log_snr[:-1] - half_log_snr[1:]  # step[i - 1]: from row i to row i - 1
    share = torch.zeros_like(gain)  # 1 / (2 r) = h / (2 h before); none in the first and last step
    share[1:-1] = step[:-1] / (2 * step[1:])
    return _fill(table, ratio, gain, share)


@torch.no_grad()
def dpm_solver_pp_encode_table(schedule: NoiseSchedule, indices: Tensor) -> Tensor:
    """The same from s to t. From clean data the first step is `ddim_encode_table`'s."""
    spaced = schedule.respace(indices)
    table = ddim_encode_table(schedule, indices).double()
    sigma = spaced.sqrt_one_minus_alpha_bars
    ratio = sigma[1:] / sigma[:-1]
    gain = spaced.sqrt_alpha_bars[1:] - ratio * spaced.sqrt_alpha_bars[:-1]
    half_log_snr = spaced.snr.log() / 2
    step = half_log_snr[1:] - half_log_snr[:-1]
    share = torch.zeros_like(gain)
    share[1:] = step[1:] / (2 * step[:-1])
    table[1:, StepColumn.COEF_EPS] = 0.0
    return torch.cat([table[:1].float(), _fill(table[1:], ratio, gain, share)])


def _fill(table: Tensor, ratio: Tensor, gain: Tensor, share: Tensor) -> Tensor:
    c = StepColumn
    table[:, c.COEF_X_T] = ratio
    table[:, c.COEF_X0] = gain * (1 + share)
    table[:, c.COEF_EXTRA] = -gain * share
    return table.float()
