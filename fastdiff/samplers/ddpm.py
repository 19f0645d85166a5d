"""Ancestral sampling (DDPM algorithm 2, Math §7)."""

from __future__ import annotations

from torch import Tensor

from fastdiff import ops
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers.base import Run, Sampler


class DDPM(Sampler):
    """x_s = mu~(x0_hat, x_t) + sigma z, with the diffusion's variance (DDPM alg. 2, Math §7).

    On a subsequence the betas are respaced (IDDPM): 1 - beta' = abar_t / abar_s.

    Parameters
    ----------
    diffusion
        Its `variance` is the one used here.
    steps, spacing
        Which timesteps are visited, all by default; see `spaced_indices`.
    clip_denoised
        Clip the predicted x0 to [-1, 1] in every step.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> sampler = fastdiff.samplers.DDPM(diffusion, steps=10)
    >>> images = sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8), progress=False)
    """

    takes_mean_shift = True

    def _table(self) -> Tensor:
        return self.diffusion.schedule.ddpm_table(self.indices, self.diffusion.variance)

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        output, uncond, scale = run.evaluate(x, row)
        noise = None
        if run.mean_shift is not None:
            # mu + Sigma g + sigma z = mu + sigma (z + sigma g), for any sigma the step may use.
            noise = run.noise(x, stream)
            noise += self._sigma(run, x, output, row) * run.mean_shift(x, row).to(noise.dtype)
        found = ops.ddpm_step(
            x,
            output,
            run.rows[row],
            run.table,
            prediction=self.diffusion.prediction,
            learned_range=self.diffusion.learns_variance,
            clip=self.clip_denoised,
            uncond=uncond,
            guidance_scale=scale,
            noise=noise,
            seed=run.keys if noise is None else None,
            stream=stream,
            return_pred_x0=run.wants_x0,
        )
        return found if run.wants_x0 else (found, None)

    def _sigma(self, run: Run, x: Tensor, output: Tensor, row: int) -> Tensor:
        """Standard deviation of the step, per element where the network predicts it."""
        sigma = run.table[row, StepColumn.SIGMA]
        if not self.diffusion.learns_variance:
            return sigma
        v = self.diffusion.split_output(output, x)[1].to(sigma.dtype)
        return sigma * (0.5 * run.table[row, StepColumn.LOG_VARIANCE_SLOPE] * v).exp()
