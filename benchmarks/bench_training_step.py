"""A training step of a published network: noise, forward, loss, backward, Adam.

Ours is `GaussianDiffusion.training_losses` and `fastdiff.UNet`; the peers add noise, call their
network and take the loss as their documentation shows. Every contender's loss and gradients, for
one given noise, are compared with float64 before it is timed. Adam runs with a learning rate of 0,
so that every repetition computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from benchmarks.networks import BETAS, DIFFUSERS, LUCIDRAINS, Network, T
from benchmarks.suite import OURS, Contender

Losses = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor | None], Tensor]
# Roundings of float32 that the loss may take (a mean: they cancel), and the gradient, in norm.
LOSS_ROUNDINGS, ROUNDINGS = 32, 200


def our_loss(x0: Tensor, t: Tensor) -> Losses:
    diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(T))

    def loss(model: Callable[[Tensor, Tensor], Tensor], noise: Tensor | None) -> Tensor:
        seed = 0 if noise is None else None
        return diffusion.training_losses(model, x0, t, noise=noise, seed=seed)["loss"].mean()

    return loss


def diffusers_loss(x0: Tensor, t: Tensor) -> Losses:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**BETAS)

    def loss(model: Callable[[Tensor, Tensor], Tensor], noise: Tensor | None) -> Tensor:
        noise = torch.randn_like(x0) if noise is None else noise
        return F.mse_loss(model(scheduler.add_noise(x0, noise, t), t), noise)

    return loss


# denoising-diffusion-pytorch's p_losses computes the same, with tables in buffers.
LOSSES = {OURS: our_loss, DIFFUSERS: diffusers_loss, LUCIDRAINS: diffusers_loss}


def gradients(
    loss: Losses, model: Callable, parameters: list[Tensor], noise: Tensor
) -> tuple[Tensor, list[Tensor]]:
    value = loss(model, noise)
    return value.detach(), list(torch.autograd.grad(value, parameters, allow_unused=True))


def contender(network: Network, x0: Tensor, t: Tensor) -> Contender:
    """One step, and the check of its loss and gradients."""
    loss = LOSSES[network.name](x0, t)
    trained = list(network.module.parameters())
    optimizer = torch.optim.Adam(trained, lr=0.0)

    def step() -> Tensor:
        value = loss(network, None)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    def error(result: Tensor) -> str | None:
        if not torch.isfinite(result):
            return f"its loss is {result.item()}"
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2)).to(x0.device)
        value, _ = found = gradients(loss, network, trained, noise)
        wide = our_loss(x0.double(), t)
        exact = list(network.exact.parameters())
        right, _ = expected = gradients(wide, network.in_float64, exact, noise.double())
        limit = LOSS_ROUNDINGS * torch.finfo(torch.float32).eps / 2
        off = abs(value.item() - right.item()) / right.item()
        if not off <= limit:
            return f"its loss is off by {off:.2g}, allowed {limit:.2g}"
        limit = ROUNDINGS * torch.finfo(torch.float32).eps / 2
        norm, reference = (
            torch.stack([g.double().norm() for g in grads if g is not None]).norm().item()
            for _, grads in (found, expected)
        )
        off = abs(norm - reference) / reference
        if network.name != DIFFUSERS:  # the same parameters in the same order
            differences = [
                (a.double() - b).norm()
                for a, b in zip(found[1], expected[1], strict=True)
                if a is not None
            ]
            off = torch.stack(differences).norm().item() / reference
        return None if off <= limit else f"its gradient is off by {off:.2g}, allowed {limit:.2g}"

    return Contender(step, error, peer=network.name != OURS)
