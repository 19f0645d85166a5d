"""Annealed Langevin dynamics over the noise levels (NCSN algorithm 1, Math §7)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff._types import check_ints
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.step_tables import conversion_table
from fastdiff.reference.checks import shown
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers.base import Run, Sampler
from fastdiff.samplers.resolution import check_langevin
from fastdiff.samplers.spacing import Spacing


class AnnealedLangevin(Sampler):
    """At every level: x <- x + (d/2) score + sqrt(d) z, `inner_steps` times (NCSN alg. 1, Math §7).

    NCSN's levels are those of xb = x / sqrt(abar), with noise sg_t = sqrt((1 - abar_t)/abar_t); its
    step sizes are proportional to sg_t^2, in x's units d = step_size (1 - abar_t). A move to the
    next level leaves xb as it is: the schedule is a list of noise levels, time plays no part.
    Samples are Langevin's at the last level, then denoised to E[x0 | x] (Jolicoeur-Martineau et
    al. 2021), which costs one evaluation more: S `inner_steps` + 1 in all.

    Parameters
    ----------
    diffusion
        The process the model was trained on. A learned variance is not used.
    steps, spacing
        The levels visited, all by default; "logsnr" spaces them geometrically, as NCSN does.
    inner_steps
        Langevin steps per level.
    step_size
        d / (1 - abar_t), in (0, 4): Langevin's discretization diverges beyond. NCSN's published
        setting (2e-5 at sg = 0.01) is 0.2, with 100 inner steps. With few, larger is better: for
        Gaussian data, S = 100 and 5 inner steps the variance comes out 24 % too large at 0.2, 9 %
        at 0.5 and 5 % at 1.
    clip_denoised
        Clip the predicted x0 to [-1, 1] in every evaluation.

    Raises
    ------
    ValueError
        step_size or inner_steps out of range, zero terminal SNR, or levels so far apart that the
        steps cannot follow: Gaussian data of standard deviation 1/2 must come out with at most four
        times their variance.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> sampler = fastdiff.samplers.AnnealedLangevin(diffusion, steps=10, inner_steps=2)
    >>> images = sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8), progress=False)
    """

    finite_noise_level = True

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        steps: int | None = None,
        spacing: Spacing = "logsnr",
        *,
        inner_steps: int = 5,
        step_size: float = 0.5,
        clip_denoised: bool = True,
    ) -> None:
        check_ints(1, inner_steps=inner_steps)
        if not 0 < step_size < 4:
            raise ValueError(f"step_size is {shown(step_size)}, expected a number in (0, 4)")
        super().__init__(diffusion, steps, spacing, clip_denoised=clip_denoised)
        self.inner_steps = inner_steps
        self.step_size = step_size
        check_langevin(diffusion.schedule, self.indices, inner_steps, step_size)

    def _table(self) -> Tensor:
        return annealed_langevin_table(self.diffusion.schedule, self.indices, self.step_size)

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        first, pred_x0 = (stream - 1) * self.inner_steps + 1, None
        for k in range(self.inner_steps):
            last = k == self.inner_steps - 1
            outputs = run.evaluate(x, row)
            use = self.steps + row if last else row
            x, x0 = self._update(run, x, outputs, use, stream=first + k)
            pred_x0 = x0 if pred_x0 is None else pred_x0
        if row == 0:
            x = self._update(run, x, run.evaluate(x, row), 2 * self.steps)[0]
        return x, pred_x0


@torch.no_grad()
def annealed_langevin_table(schedule: NoiseSchedule, indices: Tensor, step_size: float) -> Tensor:
    """S rows of Langevin, S of Langevin and then the move to the next level, one that denoises."""
    c = StepColumn
    spaced = schedule.respace(indices)
    stay = conversion_table(schedule, indices)
    noise = spaced.sqrt_one_minus_alpha_bars
    stay[:, c.COEF_X_T] = 1.0
    stay[:, c.COEF_EPS] = -0.5 * step_size * noise
    stay[:, c.SIGMA] = step_size**0.5 * noise
    move = stay.clone()
    moved = spaced.alphas.rsqrt()
    moved[0] = 1.0  # the last level is left by denoising
    move[:, [c.COEF_X_T, c.COEF_EPS, c.SIGMA]] *= moved[:, None]
    denoise = conversion_table(schedule, indices[:1])
    denoise[:, c.COEF_X0] = 1.0
    return torch.cat([stay, move, denoise]).float()
