"""Fused kernels for denoising diffusion models, with a U-Net trainer and samplers."""

from fastdiff import (
    analytic,
    guidance,
    ops,
    parameterizations,
    reference,
    samplers,
    timestep_samplers,
    weightings,
)
from fastdiff._backends import backends, default_backend, use_backend
from fastdiff.categorical import CategoricalDiffusion
from fastdiff.gaussian import GaussianDiffusion
from fastdiff.guidance import ClassifierFree, ClassifierGuidance, DynamicThresholding
from fastdiff.likelihood import flow_likelihood
from fastdiff.nn import UNet
from fastdiff.schedules import NoiseSchedule

__version__ = "0.1.0"

__all__ = [
    "CategoricalDiffusion",
    "ClassifierFree",
    "ClassifierGuidance",
    "DynamicThresholding",
    "GaussianDiffusion",
    "NoiseSchedule",
    "UNet",
    "__version__",
    "analytic",
    "backends",
    "default_backend",
    "flow_likelihood",
    "guidance",
    "ops",
    "parameterizations",
    "reference",
    "samplers",
    "timestep_samplers",
    "use_backend",
    "weightings",
]
