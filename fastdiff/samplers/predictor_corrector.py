"""Predictor-corrector sampling (Score-SDE algorithms 1, 3 and 5, Math §7)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff._types import check_ints, check_name
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.step_tables import conversion_table
from fastdiff.reference.checks import LARGEST_FLOAT, shown
from fastdiff.reference.step_columns import StepColumn
from fastdiff.samplers.base import Run, Sampler
from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.ddpm import DDPM
from fastdiff.samplers.probability_flow import ProbabilityFlow
from fastdiff.samplers.reverse_sde import ReverseSDE
from fastdiff.samplers.spacing import Spacing

PREDICTORS = {
    "reverse_diffusion": lambda *args, **kw: ReverseSDE(*args, method="reverse_diffusion", **kw),
    "euler_maruyama": ReverseSDE,
    "ancestral": DDPM,
    "ddim": lambda diffusion, steps, spacing, **kw: DDIM(diffusion, steps, spacing=spacing, **kw),
    "probability_flow": ProbabilityFlow,
}
"""What takes a step to the next timestep, by name."""


class PredictorCorrector(Sampler):
    """Langevin steps at level t (the corrector), then one step of another sampler (the predictor).

    Corrector (Score-SDE alg. 5): x <- x + e g + sqrt(2 e) z, with g the score and
    e = 2 alpha_t (snr |z| / |g|)^2; the norms are those of each sample, so that its result does not
    depend on the rest of the batch (it takes a few dozen dimensions for them to be steady). The
    corrector knows no time, only the level; alpha_t = abar_t / abar_{t-1} is that of the full
    sequence. The predictor brings its own reading of time;
    "reverse_diffusion" is algorithm 3's. (1 + corrector_steps) S evaluations.

    Parameters
    ----------
    diffusion
        The process the model was trained on.
    steps, spacing
        Which timesteps are visited, all by default; see `spaced_indices`.
    predictor
        "reverse_diffusion", "euler_maruyama", "ancestral" (DDPM), "ddim" or "probability_flow".
    corrector_steps
        Langevin steps before each predictor step.
    snr
        r of the corrector's step size; Score-SDE's best values lie near 0.16.
    clip_denoised
        Clip the predicted x0 to [-1, 1] in every evaluation.

    Raises
    ------
    ValueError
        Unknown predictor, numbers out of range, zero terminal SNR.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> sampler = fastdiff.samplers.PredictorCorrector(diffusion, steps=10)
    >>> images = sampler.sample(lambda x, t: 0.1 * x, (2, 1, 8, 8), progress=False)
    """

    finite_noise_level = True

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        steps: int | None = None,
        spacing: Spacing = "leading",
        *,
        predictor: str = "reverse_diffusion",
        corrector_steps: int = 1,
        snr: float = 0.16,
        clip_denoised: bool = True,
    ) -> None:
        check_name("predictor", predictor, PREDICTORS)
        check_ints(0, corrector_steps=corrector_steps)
        if not 0 < snr <= LARGEST_FLOAT:
            raise ValueError(f"snr is {shown(snr)}, expected a positive number")
        super().__init__(diffusion, steps, spacing, clip_denoised=clip_denoised)
        self.predictor = PREDICTORS[predictor](
            diffusion, None, self.indices, clip_denoised=clip_denoised
        )
        self.corrector_steps = corrector_steps
        self._alphas = diffusion.schedule.alphas[self.indices].tolist()
        self.snr = snr

    def _table(self) -> Tensor:
        """The predictor's rows, then S that turn an output into the score."""
        score = conversion_table(self.diffusion.schedule, self.indices)
        score[:, StepColumn.COEF_EPS] = -score[:, StepColumn.RECIP_SQRT_ONE_MINUS_ALPHA_BAR]
        return torch.cat([self.predictor._table(), score.float()])

    def _step(self, run: Run, x: Tensor, row: int, stream: int) -> tuple[Tensor, Tensor | None]:
        first = (stream - 1) * (self.corrector_steps + 1) + 1
        for k in range(self.corrector_steps):
            x = self._correct(run, x, row, first + k)
        return self.predictor._step(run, x, row, first + self.corrector_steps)

    def _correct(self, run: Run, x: Tensor, row: int, stream: int) -> Tensor:
        score = self._update(run, x, run.evaluate(x, row), self.steps + row)[0]
        noise = run.noise(x, stream)
        score = score.to(noise.dtype)
        ratio = _norm(noise) / _norm(score).clamp(min=torch.finfo(noise.dtype).tiny)
        step = 2 * self._alphas[row] * (self.snr * ratio) ** 2
        return (x + step * score + (2 * step).sqrt() * noise).to(x.dtype)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, broadcastable against x."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
