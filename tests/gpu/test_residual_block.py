"""What a residual block puts around its norm, on a device: dropout, the residual sum, gradients."""

from __future__ import annotations

import pytest
import torch
from gpu.needs import GPU
from torch import Tensor

import fastdiff
from fastdiff import ops

pytestmark = GPU

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# (shape, groups): whole vectors, odd sizes, small maps, a group of 384 KB in bfloat16 that is split
# where there are no clusters.
SHAPES = {
    "vectors": ((2, 32, 8, 8), 8),
    "odd": ((3, 12, 7, 5), 3),
    "small": ((8, 64, 4, 4), 4),
    "large": ((1, 16, 128, 96), 1),
}
# Of the largest value; the float32 reference and a kernel differ by sums in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7}

every_case = [
    pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"]),
    pytest.mark.parametrize("layout", LAYOUTS),
    pytest.mark.parametrize("shape", SHAPES),
]


def for_every_case(test):
    for mark in every_case:
        test = mark(test)
    return test


def inputs(shape: str, dtype: torch.dtype, layout: str, device: str) -> dict[str, Tensor]:
    sizes, _ = SHAPES[shape]
    channels = sizes[1]
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(sizes, generator=generator)
        .to(dtype)
        .contiguous(memory_format=LAYOUTS[layout])
        for name in ("x", "residual", "grad", "grad_sum")
    }
    for name in ("weight", "bias", "sum_bias"):
        made[name] = torch.randn(channels, generator=generator)
    made["channel_bias"] = torch.randn(sizes[:2], generator=generator)
    return {name: value.to(device).requires_grad_() for name, value in made.items()}


def dropped(given: dict[str, Tensor], groups: int, seed: int | Tensor) -> dict[str, Tensor]:
    names = ("x", "weight", "bias", "channel_bias")
    x, weight, bias, channel_bias = (given[name] for name in names)
    y = ops.group_norm_silu(
        x, groups, weight, bias, channel_bias=channel_bias, dropout_p=0.3, seed=seed, stream=5
    )
    found = torch.autograd.grad(y, [given[name] for name in names], given["grad"].detach())
    return {"y": y} | dict(zip(names, found, strict=True))


def summed(given: dict[str, Tensor], groups: int) -> dict[str, Tensor]:
    names = ("x", "residual", "weight", "bias", "sum_bias")
    x, residual, weight, bias, sum_bias = (given[name] for name in names)
    total, y = ops.residual_group_norm_silu(x, residual, groups, weight, bias, sum_bias=sum_bias)
    found = torch.autograd.grad(
        (y, total),
        [given[name] for name in names],
        (given["grad"].detach(), given["grad_sum"].detach()),
    )
    return {"sum": total, "y": y} | dict(zip(names, found, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in expected.items():
        atol = TOLERANCE[dtype] * value.abs().max().item()
        torch.testing.assert_close(found[name].cpu(), value, rtol=0, atol=atol, msg=name)


@for_every_case
def test_dropout(backend: str, shape: str, layout: str, dtype: torch.dtype) -> None:
    """The mask is the reference's; without it nothing is dropped."""
    groups = SHAPES[shape][1]
    keys = torch.arange(SHAPES[shape][0][0]) * 2**40 - 3
    with fastdiff.use_backend("reference"):
        expected = dropped(inputs(shape, dtype, layout, "cpu"), groups, keys)
    with fastdiff.use_backend(backend):
        found = dropped(inputs(shape, dtype, layout, "cuda"), groups, keys.cuda())
    assert torch.equal(found["y"].cpu() == 0, expected["y"] == 0)
    assert_same(found, expected, dtype)


@for_every_case
def test_residual(backend: str, shape: str, layout: str, dtype: torch.dtype) -> None:
    """The sum is the reference's bit for bit; its gradient is added inside."""
    groups = SHAPES[shape][1]
    with fastdiff.use_backend("reference"):
        expected = summed(inputs(shape, dtype, layout, "cpu"), groups)
    with fastdiff.use_backend(backend):
        found = summed(inputs(shape, dtype, layout, "cuda"), groups)
    assert torch.equal(found["sum"].cpu(), expected["sum"])
    assert torch.equal(found["x"], found["residual"])
    assert_same(found, expected, dtype)


def test_a_graph_drops_what_its_keys_say(backend: str) -> None:
    """Keys in device memory: every replay has the mask of the keys that are there then."""
    x = torch.randn(2, 32, 8, 8, device="cuda")
    keys = torch.tensor([1, 2], device="cuda")
    with fastdiff.use_backend(backend):

        def call() -> Tensor:
            return ops.group_norm_silu(x, 8, None, None, dropout_p=0.5, seed=keys)

        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        for first in (10, 20):
            keys.copy_(torch.tensor([first, first + 1]))
            graph.replay()
            assert torch.equal(y, call())
    kept = (y != 0).float().mean().item()
    assert 0.45 < kept < 0.55
