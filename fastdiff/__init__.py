"""Fused kernels for denoising diffusion models, with a U-Net trainer and samplers."""

from fastdiff import ops, reference, samplers
from fastdiff._backends import backends, default_backend, use_backend
from fastdiff.diffusion import (
    analytic,
    guidance,
    parameterizations,
    timestep_samplers,
    weightings,
)
from fastdiff.diffusion.categorical import CategoricalDiffusion
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.guidance import ClassifierFree, ClassifierGuidance, DynamicThresholding
from fastdiff.diffusion.likelihood import flow_likelihood
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.integrations.compile_pass import compile_pass
from fastdiff.integrations.patching import patch, unpatch
from fastdiff.integrations.tiled_decode import tiled_decode
from fastdiff.nn import UNet

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
    "tiled_decode",
    "timestep_samplers",
    "unpatch",
    "use_backend",
    "weightings",
]
