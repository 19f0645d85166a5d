"""Whole networks for the end-to-end benchmarks: ours, and what a user would take instead.

diffusers' UNet2DModel gets the same weights, so that its results must be the same. The U-Net of
denoising-diffusion-pytorch has another architecture (its width and multipliers are set alike), so
its results are compared with its own in float64; it runs under diffusers' schedulers.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from benchmarks.suite import OURS

DIFFUSERS, LUCIDRAINS = "diffusers", "denoising-diffusion-pytorch"
PUBLISHED = ("digits", "ddpm_cifar10", "iddpm_cifar10", "ddim_celeba64", "ddpm_256")
# Images of one step on a CPU, by preset.
BATCHES = {"digits": 64, "ddpm_cifar10": 2, "iddpm_cifar10": 2, "ddim_celeba64": 1, "ddpm_256": 1}
T = 1000
BETAS = {"num_train_timesteps": T, "beta_start": 1e-4, "beta_end": 0.02}


@dataclass
class Network:
    """A module, how it is called, and the float64 network that it must agree with."""

    name: str
    module: nn.Module
    call: Callable[[nn.Module, Tensor, Tensor], Tensor]
    exact: nn.Module
    exact_call: Callable[[nn.Module, Tensor, Tensor], Tensor]
    compiled: bool = False
    _module: Any = field(init=False)

    def __post_init__(self) -> None:
        self._module = torch.compile(self.module, dynamic=False) if self.compiled else self.module

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.call(self._module, x_t, t)

    def in_float64(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.exact_call(self.exact, x_t, t)


def plain(module: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    return module(x_t, t)


def of_sample(module: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    return module(x_t, t).sample


def double_time(module: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    """denoising-diffusion-pytorch embeds the time in the time's dtype, or float32 for integers."""
    return module(x_t, t.double())


def awake(unet: nn.Module) -> nn.Module:
    """Layers that start at zero get weights, or a network without them would agree with itself."""
    generator = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.data.normal_(0, 0.02, generator=generator)
    return unet


def networks(
    preset: str, device: torch.device, layout: torch.memory_format, compiled: bool, **overrides: Any
) -> list[Network]:
    """Ours and its peers. Dropout is off, as its masks would differ; so is a learned variance,
    for which the peers have no loss.
    """
    torch.manual_seed(0)
    overrides = {"dropout": 0.0, "learned_variance": False, **overrides}
    unet = awake(fastdiff.UNet.from_preset(preset, **overrides)).train()
    exact = copy.deepcopy(unet).double()
    found = [(OURS, unet, plain, exact, plain)]
    config = unet.config
    if importlib.util.find_spec("diffusers") is not None:
        from diffusers.utils import logging

        logging.set_verbosity_error()  # it warns at every .to(), for an empty list of modules
        found.append((DIFFUSERS, unet.to_diffusers().train(), of_sample, exact, plain))
        if importlib.util.find_spec("denoising_diffusion_pytorch") is not None:
            from denoising_diffusion_pytorch import Unet

            channels = config.in_channels
            theirs = Unet(config.channels, dim_mults=config.channel_mult, channels=channels)
            found.append((LUCIDRAINS, theirs, plain, copy.deepcopy(theirs).double(), double_time))
    return [
        Network(
            name,
            module.to(device, memory_format=layout),
            call,
            exact.to(device),
            exact_call,
            compiled,
        )
        for name, module, call, exact, exact_call in found
    ]


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def release() -> None:
    """Give freed memory back to the system, which the steady allocator otherwise keeps."""
    ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that one call needs beyond what is there before it.

    On the CPU from Linux' high-water mark of resident pages, which can be reset; None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
    if not status.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None

    def kib(what: str) -> int:
        return int(re.search(rf"^{what}:\s+(\d+) kB", status.read_text(), re.MULTILINE)[1])

    release()
    try:
        reset.write_text("5")
    except OSError:  # a container may forbid it
        return None
    before = kib("VmRSS")
    call()
    return max(0, kib("VmHWM") - before) * 1024


def slope(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Of the least-squares line in log-log: the power with which cost grows."""
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
