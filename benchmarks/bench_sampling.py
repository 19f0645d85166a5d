"""DDIM sampling with a published network, eta = 0: ours and diffusers' from the same x_T.

Both visit the same timesteps with the same weights, so the images must be equal; they are compared
with float64 before the time is taken. denoising-diffusion-pytorch's network runs under diffusers'
scheduler: its own sampler visits other timesteps and draws a progress bar.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastdiff
from benchmarks.networks import BETAS, Network, T
from benchmarks.suite import OURS, Contender

Model = Callable[[Tensor, Tensor], Tensor]
# Roundings of float32 in the network's output.
ROUNDINGS = 200


def our_sampler(steps: int) -> Callable[[Model, Tensor], Tensor]:
    diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(T))
    sampler = fastdiff.samplers.DDIM(diffusion, steps=steps)
    return lambda model, x_T: sampler.sample(model, x_T=x_T, progress=False)


def diffusers_sampler(steps: int) -> Callable[[Model, Tensor], Tensor]:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**BETAS)
    scheduler.set_timesteps(steps)

    @torch.no_grad()
    def sample(model: Model, x: Tensor) -> Tensor:
        for t in scheduler.timesteps:
            output = model(x, t.expand(len(x)).to(x.device))
            x = scheduler.step(output, t, x, use_clipped_model_output=True, return_dict=False)[0]
        return x

    return sample


def contender(network: Network, x_T: Tensor, steps: int) -> Contender:
    """All steps, and the check of the images."""
    ours = network.name == OURS
    sampler = our_sampler(steps) if ours else diffusers_sampler(steps)
    # Eager, our sampler gets the U-Net itself, of which it takes the inference form on a CPU.
    model = network.module if ours and not network.compiled else network

    def error(result: Tensor) -> str | None:
        exact = our_sampler(steps)(network.in_float64, x_T.double())
        # An error of eps is one of x0 times noise over signal, which is largest in the first step.
        first = (T // steps) * (steps - 1)
        alpha_bar = fastdiff.NoiseSchedule.linear(T).alpha_bars[first].item()
        limit = ROUNDINGS * torch.finfo(torch.float32).eps / 2
        limit *= max(1.0, ((1 - alpha_bar) / alpha_bar) ** 0.5)
        off = (result.double() - exact).abs().max().item()
        return None if off <= limit else f"images are off by {off:.2g}, allowed {limit:.2g}"

    return Contender(lambda: sampler(model, x_T), error, peer=not ours)
