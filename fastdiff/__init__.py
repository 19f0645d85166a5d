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
from fastdiff.integrations.compile_pass import compile_pass
from fastdiff.integrations.patching import patch, unpatch
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
    "compile_pass",
    "default_backend",
    "flow_likelihood",
    "guidance",
    "ops",
    "parameterizations",
    "patch",
    "reference",
    "samplers",
    "timestep_samplers",
    "unpatch",
    "use_backend",
    "weightings",
]
