"""Arguments that Triton's launchers have to prepare: against the reference on a CPU."""

from __future__ import annotations

import torch
from gpu.needs import GPU
from torch import Tensor

import fastdiff
from fastdiff import ops

pytestmark = GPU


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(output, inputs, torch.ones_like(output))
    return [x.detach().cpu() for x in (output, *found)]


def test_a_sum_of_losses(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, noise = torch.randn(2, 3, 4, 5, 7, generator=generator).unbind(0)
    weight = torch.rand(3, generator=generator)
    found = []
    for name, device in (("reference", "cpu"), (backend, "cuda")):
        x = prediction.to(device).requires_grad_()
        with fastdiff.use_backend(name):
            loss = ops.eps_loss(x, noise.to(device), weight=weight.to(device), reduction="sum")
            found.append(gradients(loss, x))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_scales_that_are_a_transposed_matrix(backend: str) -> None:
    """No distance between samples, a long one between channels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 8, 5, 3, generator=generator)
    matrix = torch.randn(8, 4, generator=generator)
    found = []
    for name, device in (("reference", "cpu"), (backend, "cuda")):
        x, scale = values.to(device).requires_grad_(), matrix.to(device).requires_grad_()
        with fastdiff.use_backend(name):
            y = ops.group_norm_silu(x, 4, None, None, scale=scale.t()[:2])
            found.append(gradients(y, x, scale))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
