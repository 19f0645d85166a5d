"""The reverse-time SDE of the variance-preserving process (Score-SDE eqs. 6 and 11, Math §7)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff._types import check_name
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.step_tables import conversion_table
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers.base import Run, Sampler
from fastdiff.samplers.resolution import euler_in_time
from fastdiff.samplers.spacing import Spacing

METHODS = ("euler_maruyama", "reverse_diffusion")


class ReverseSDE(Sampler):
    """x_s = x_t + B (x_t / 2 + score) + sqrt(B) z, the SDE reversed in time, by Euler-Maruyama.

    Time: the forward SDE dx = -1/2 beta(u) x du + sqrt(beta(u)) dw has log abar(u) = -integral of
    beta, so a step from t to s takes B = log abar_s - log abar_t, the integral of beta(u) over it:
    the schedule defines its own continuous time, for any subsequence. Over the full sequence B =
    -log(1 - beta_t), which is beta_t as beta_t -> 0, where the step becomes DDPM's.

    `method="reverse_diffusion"` is Score-SDE's discretization (app. E, algorithm 3):
    x_s = (2 - sqrt(1 - beta')) x_t + beta' score + sqrt(beta') z with 1 - beta' = abar_t / abar_s.

    The last step adds no noise. A step with B > 1 (the cosine schedule's last has 6.9) is the
    ancestral one, DDPM's with beta~, which both methods tend to as B -> 0: Euler's would leave 1 +
    B^2 / 4 times the variance of pure noise, and turn it around beyond B = 2.

    Parameters
    ----------
    diffusion
        The process the model was trained on. A learned variance is not used.
    steps, spacing
        Which timesteps are visited, all by default; see `spaced_indices`.
    method
        "euler_maruyama" or "reverse_diffusion".
    clip_denoised
        Clip the predicted x0 to [-1, 1] in every step.

    Raises
    ------
    ValueError
        Unknown method, steps or spacing that do not fit, or zero terminal SNR (infinite time).

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> sampler = fastdiff.samplers.ReverseSDE(diffusion)
    >>> images = sampler.sample(lambda x, t: torch.zeros_like(x), (2, 1, 8, 8), progress=False)
    """

    finite_noise_level = True

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        steps: int | None = None,
        spacing: Spacing = "leading",
        *,
        method: str = "euler_maruyama",
        clip_denoised: bool = True,
    ) -> None:
        check_name("method", method, METHODS)
        super().__init__(diffusion, steps, spacing, clip_denoised=clip_denoised)
        self.method = method

    def _table(self) -> Tensor:
        return reverse_sde_table(self.diffusion.schedule, self.indices, self.method)

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        return self._update(run, x, run.evaluate(x, row), row, stream=stream)


@torch.no_grad()
def reverse_sde_table(schedule: NoiseSchedule, indices: Tensor, method: str) -> Tensor:
    """Rows of `ReverseSDE`, with score = -eps / sqrt(1 - abar_t)."""
    c = StepColumn
    spaced = schedule.respace(indices)
    table = conversion_table(schedule, indices)
    if method == "euler_maruyama":
        elapsed = -spaced.log_alphas
        table[:, c.COEF_X_T] = 1 + elapsed / 2
    else:
        elapsed = spaced.betas
        table[:, c.COEF_X_T] = 2 - spaced.alphas.sqrt()
    table[:, c.COEF_EPS] = -elapsed / spaced.sqrt_one_minus_alpha_bars
    table[:, c.SIGMA] = elapsed.sqrt()
    ancestral = ~euler_in_time(schedule, indices)
    table[ancestral, c.COEF_X0] = spaced.posterior_mean_coef_x0[ancestral]
    table[ancestral, c.COEF_X_T] = spaced.posterior_mean_coef_x_t[ancestral]
    table[ancestral, c.COEF_EPS] = 0.0
    table[ancestral, c.SIGMA] = spaced.posterior_variance[ancestral].sqrt()
    table[0, c.SIGMA] = 0.0
    return table.float()
