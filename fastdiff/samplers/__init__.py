"""Samplers: one file per family, one interface (`Sampler`)."""

from fastdiff.samplers.base import Sampler
from fastdiff.samplers.ddim import DDIM
from fastdiff.samplers.ddpm import DDPM
from fastdiff.samplers.spacing import SPACINGS, spaced_indices

__all__ = ["DDIM", "DDPM", "SPACINGS", "Sampler", "spaced_indices"]
