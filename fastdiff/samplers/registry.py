"""Samplers by name, as the command line and configuration files choose them."""

from __future__ import annotations

import inspect
from typing import Any

from fastdiff._types import check_name
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.samplers.annealed_langevin import AnnealedLangevin
from fastdiff.samplers.base import Sampler
from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.ddpm import DDPM
from fastdiff.samplers.dpm_solver_pp import DPMSolverPP
from fastdiff.samplers.heun import Heun
from fastdiff.samplers.predictor_corrector import PredictorCorrector
from fastdiff.samplers.probability_flow import ProbabilityFlow
from fastdiff.samplers.reverse_sde import ReverseSDE

SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "probability_flow": ProbabilityFlow,
    "heun": Heun,
    "dpm_solver_pp": DPMSolverPP,
    "reverse_sde": ReverseSDE,
    "annealed_langevin": AnnealedLangevin,
    "predictor_corrector": PredictorCorrector,
}
"""Name -> class."""


def from_name(name: str, diffusion: GaussianDiffusion, **options: Any) -> Sampler:
    """The sampler called `name`, with that class's options.

    Raises
    ------
    ValueError
        An unknown name or option; the message lists the known ones.

    Examples
    --------
    >>> import fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> fastdiff.samplers.from_name("heun", diffusion, steps=10).steps
    10
    """
    check_name("sampler", name, SAMPLERS)
    known = sampler_options(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{name} takes no {', '.join(unknown)}; its options: {', '.join(known)}")
    return SAMPLERS[name](diffusion, **options)


def sampler_options(name: str) -> list[str]:
    """Keyword arguments of the sampler called `name`, without the diffusion."""
    return [*inspect.signature(SAMPLERS[name]).parameters][1:]
