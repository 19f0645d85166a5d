"""A sampler's loop and a training step, captured in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu.needs import GPU
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.nn import UNet

STEPS = 5
BATCH, SHAPE = 4, (1, 8, 8)

pytestmark = GPU


def network(device: str) -> UNet:
    torch.manual_seed(0)
    unet = UNet.from_preset("digits").eval()  # no dropout: its state is not part of the graph
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.xavier_uniform_(parameter)
    return unet.to(device)


def sampler(device: str) -> tuple[Callable[[], Tensor], Tensor]:
    """A guided DDIM loop with noise, from a tensor that may be refilled."""
    unet, schedule = network(device).requires_grad_(False), fastdiff.NoiseSchedule.linear(1000)
    indices = torch.arange(0, 1000, 1000 // STEPS)
    table = schedule.ddim_table(indices, eta=1.0).to(device)
    rows = [torch.full((BATCH,), row, device=device) for row in range(STEPS)]
    times = [torch.full((BATCH,), int(index), device=device) for index in indices]
    keys = ops.sample_keys(3, BATCH, device=device)
    start = torch.zeros(BATCH, *SHAPE, device=device)

    def loop() -> Tensor:
        x = start
        for row in reversed(range(STEPS)):
            output = unet(x, times[row])
            x = ops.ddim_step(
                x,
                output,
                rows[row],
                table,
                uncond=0.5 * output,
                guidance_scale=2.0,
                seed=keys,
                stream=row,
            )
        return x

    return loop, start


def trainer(device: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """One step of gradient descent on L_simple, whose noise is made twice from its keys."""
    unet = network(device)
    tables = fastdiff.NoiseSchedule.linear(1000).tables(torch.device(device))
    x0 = torch.linspace(-1, 1, BATCH * 64, device=device).view(BATCH, *SHAPE)
    t = torch.linspace(0, 999, BATCH, device=device).long()
    keys = ops.sample_keys(5, BATCH, device=device)
    optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        x_t = ops.q_sample(x0, t, tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar, seed=keys)
        loss = ops.eps_loss(unet(x_t, t), seed=keys)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, list(unet.parameters())


def captured(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of a function that has run before, on a side stream as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.usefixtures("deterministic_convolutions")
def test_a_sampler_loop_can_be_captured(backend: str) -> None:
    loop, start = sampler("cuda")
    with fastdiff.use_backend(backend):
        graph, result = captured(loop)
        for seed in (1, 2):
            start.copy_(ops.philox_normal((BATCH, *SHAPE), seed, device="cuda"))
            graph.replay()
            replayed = result.clone()
            torch.testing.assert_close(replayed, loop(), rtol=1e-4, atol=1e-5)
            assert replayed.isfinite().all()
            assert replayed.std() > 0


@pytest.mark.usefixtures("deterministic_convolutions")
def test_a_training_step_can_be_captured(backend: str) -> None:
    """Replays train as the same number of eager steps from the same parameters does."""
    step, parameters = trainer("cuda")
    with fastdiff.use_backend(backend):
        graph, loss = captured(step)
        before = [p.detach().clone() for p in parameters]
        replayed = []
        for _ in range(STEPS):
            graph.replay()
            replayed.append(loss.item())
        after = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        eager = [step().item() for _ in range(STEPS)]
    assert replayed[-1] < replayed[0]
    torch.testing.assert_close(torch.tensor(replayed), torch.tensor(eager), rtol=1e-4, atol=1e-6)
    for one, other in zip(after, parameters, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-3, atol=1e-5)
