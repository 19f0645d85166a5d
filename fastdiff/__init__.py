"""Fused kernels for denoising diffusion models, with a U-Net trainer and samplers."""

from fastdiff import ops
from fastdiff._backends import backends, use_backend

__version__ = "0.1.0"

__all__ = ["__version__", "backends", "ops", "use_backend"]
