"""Ancestral sampling (DDPM algorithm 2, SPEC §7)."""

from __future__ import annotations

from torch import Tensor

from fastdiff import ops
from fastdiff.samplers.base import Run, Sampler


class DDPM(Sampler):
    """x_s = mu~(x0_hat, x_t) + sigma z, with the diffusion's variance (DDPM alg. 2, SPEC §7).

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

    def _table(self) -> Tensor:
        return self.diffusion.schedule.ddpm_table(self.indices, self.diffusion.variance)

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor]:
        output, uncond, scale = run.evaluate(x, row)
        return ops.ddpm_step(
            x,
            output,
            run.rows[row],
            run.table,
            prediction=self.diffusion.prediction,
            learned_range=self.diffusion.learns_variance,
            clip=self.clip_denoised,
            uncond=uncond,
            guidance_scale=scale,
            seed=run.keys,
            stream=stream,
            return_pred_x0=True,
        )
