"""Whole computations on a backend and on plain PyTorch: noise words, a training step, a sampler."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import ops, reference, samplers
from fastdiff._backends import use_backend
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.nn import UNet

_EPS = torch.finfo(torch.float32).eps
_BATCH = 4


def noise(backend: str, device: torch.device) -> tuple[float, float]:
    """Normals against the float64 reference: a single wrong word is off by O(1)."""
    keys = ops.sample_keys(1, 2, device=device)
    shape = (2, 4, 33, 31)
    expected = reference.normals(keys, shape, 3, torch.float64)
    with use_backend(backend):
        value = ops.philox_normal(shape, keys, stream=3, device=device)
    # The largest normal is 6.66; eight ulps of it.
    return float((value - expected).abs().max()), 8 * _EPS * 8


def training_step(backend: str, device: torch.device) -> tuple[float, float]:
    """Gradient of L_simple of the digits U-Net: largest difference over the largest gradient."""
    gradients = []
    for name in (backend, "reference"):
        unet = _unet(device)
        x0 = torch.linspace(-1, 1, _BATCH * 64, device=device).view(_BATCH, 1, 8, 8)
        t = torch.linspace(0, 999, _BATCH, device=device).long()
        with use_backend(name):
            losses = GaussianDiffusion(NoiseSchedule.linear(1000)).training_losses(
                unet, x0, t, seed=0
            )
            losses["loss"].mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    return _relative(*gradients), _through_network(64)


def sampling(backend: str, device: torch.device) -> tuple[float, float]:
    """Six guided DDPM steps of the digits U-Net from one seed."""
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(1000))
    unet, images = _unet(device), []
    for name in (backend, "reference"):
        sampler = samplers.DDPM(diffusion, steps=6)
        with use_backend(name):
            images.append(sampler.sample(unet, (_BATCH, 1, 8, 8), seed=3, progress=False))
    return _relative(*images), _through_network(6 * 64)


PARITY: dict[str, Callable[[str, torch.device], tuple[float, float]]] = {
    "noise words": noise,
    "training step": training_step,
    "sampler": sampling,
}
"""By name: (backend, device) -> (error, bound)."""


def _unet(device: torch.device) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet.from_preset("digits")
        # Blocks end in zeros at the start of training; without them everything takes part.
        for parameter in unet.parameters():
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.xavier_uniform_(parameter)
    return unet.to(device).eval()


def _relative(value: Tensor, expected: Tensor) -> float:
    difference = (value - expected).abs().max() / expected.abs().max()
    return float(difference) if difference.isfinite() else math.inf


def _through_network(layers: int) -> float:
    """Bound for a difference that starts at float32's rounding and passes through layers.

    Every layer adds roundings of sums over up to a thousand terms, of size sqrt(1000) eps.
    """
    return layers * math.sqrt(1000) * _EPS
