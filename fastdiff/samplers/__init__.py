"""Samplers: one file per family, one interface (`Sampler`)."""

from fastdiff.samplers.annealed_langevin import AnnealedLangevin
from fastdiff.samplers.base import Sampler
from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.ddpm import DDPM
from fastdiff.samplers.dpm_solver_pp import DPMSolverPP
from fastdiff.samplers.frames import Frames
from fastdiff.samplers.heun import Heun
from fastdiff.samplers.inpainting import Inpainting
from fastdiff.samplers.latents import consistency, interpolate, slerp
from fastdiff.samplers.predictor_corrector import PredictorCorrector
from fastdiff.samplers.probability_flow import ProbabilityFlow
from fastdiff.samplers.registry import SAMPLERS, from_name
from fastdiff.samplers.reverse_sde import ReverseSDE
from fastdiff.samplers.spacing import SPACINGS, spaced_indices

__all__ = [
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "SPACINGS",
    "AnnealedLangevin",
    "DPMSolverPP",
    "Frames",
    "Heun",
    "Inpainting",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ReverseSDE",
    "Sampler",
    "consistency",
    "from_name",
    "interpolate",
    "slerp",
    "spaced_indices",
]
