"""The gradient of `loss.backward()`, which the CPU's eps_loss makes in its forward pass."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_harness.inputs import arrange
from torch import Tensor

from fastdiff import ops
from fastdiff.reference.eps_loss import LOSS_KINDS

pytestmark = pytest.mark.cpu_kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RAW = torch.ops.fastdiff.eps_loss.default
RAW_BACKWARD = torch.ops.fastdiff.eps_loss_backward.default
RAW_BOTH = torch.ops.fastdiff.eps_loss_with_gradient.default


def raw_arguments(
    prediction: Tensor, mode: str, reduction: int, kind: int, weight: Tensor | None
) -> tuple:
    noise = torch.randn_like(prediction) if mode == "given" else None
    seed = 5 if mode == "seed" else None
    return prediction, noise, None, seed, 1 << 40, weight, reduction, kind


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("mode", ["given", "seed"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_two_passes_bit_for_bit(dtype: torch.dtype, mode: str, layout: str) -> None:
    """Which are compared with float64 in test_eps_loss.py."""
    torch.manual_seed(0)
    prediction = arrange(torch.randn(3, 5, 7, 9).to(dtype), layout)
    for reduction, kind, weighted in itertools.product((1, 2), range(len(LOSS_KINDS)), (0, 1)):
        weight = torch.rand(3) if weighted else None
        arguments = raw_arguments(prediction, mode, reduction, kind, weight)
        loss, gradient = RAW_BOTH(*arguments)
        assert torch.equal(loss, RAW(*arguments))
        expected, _ = RAW_BACKWARD(torch.ones(()), *arguments, True, False)
        assert torch.equal(gradient, expected)
        assert gradient.stride() == expected.stride()


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_tensors_out_of_cache(dtype: torch.dtype) -> None:
    """Those are written past the caches."""
    arguments = raw_arguments(torch.randn(2, 3, 1600, 1601).to(dtype), "given", 1, 0, None)
    loss, gradient = RAW_BOTH(*arguments)
    assert torch.equal(loss, RAW(*arguments))
    assert torch.equal(gradient, RAW_BACKWARD(torch.ones(()), *arguments, True, False)[0])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0), (1,)])
def test_nothing_and_one_element(shape: tuple[int, ...]) -> None:
    arguments = raw_arguments(torch.randn(shape), "given", 2, 0, None)
    loss, gradient = RAW_BOTH(*arguments)
    torch.testing.assert_close(loss, (arguments[0] - arguments[1]).square().sum())
    torch.testing.assert_close(gradient, 2 * (arguments[0] - arguments[1]))


def count_backward_calls(function: object) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    return sum(event.name == "fastdiff::eps_loss_backward" for event in profiler.events())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_used_only_for_a_gradient_of_one(dtype: torch.dtype) -> None:
    """Anything else, such as a loss scaler's, starts from the prediction: no rounding twice."""
    prediction = torch.randn(3, 4, 5, 5).to(dtype).requires_grad_()
    noise = torch.randn(3, 4, 5, 5).to(dtype)
    loss = ops.eps_loss(prediction, noise)
    assert count_backward_calls(lambda: loss.backward(retain_graph=True)) == 0
    one, prediction.grad = prediction.grad.clone(), None
    loss.backward(retain_graph=True)
    assert torch.equal(prediction.grad, one)
    prediction.grad.zero_()  # nothing that is saved
    scaled = loss * 1024
    assert count_backward_calls(lambda: scaled.backward(retain_graph=True)) == 1
    exact = 2048 * (prediction.detach().double() - noise.double()) / noise.numel()
    # Three roundings of float32, one to the dtype.
    bound = torch.finfo(dtype).eps / 2 + 4 * 2.0**-24
    assert ((prediction.grad.double() - exact).abs() <= bound * exact.abs() + 1e-30).all()
    prediction.grad = None
    loss.backward()
    assert torch.equal(prediction.grad, one)


def test_batched_and_second_gradients() -> None:
    prediction = torch.randn(2, 3, requires_grad=True)
    loss = ops.eps_loss(prediction, torch.zeros(2, 3), reduction="sum")
    (first,) = torch.autograd.grad(loss, prediction, create_graph=True)
    torch.testing.assert_close(first, 2 * prediction)
    (second,) = torch.autograd.grad(first.sum(), prediction, retain_graph=True)
    assert torch.equal(second, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("needs_noise", [False, True])
@pytest.mark.parametrize("needs_weight", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_other_gradients_come_from_the_backward_pass(
    reduction: str, needs_weight: bool, needs_noise: bool
) -> None:
    prediction = torch.randn(2, 3, requires_grad=True)
    noise = torch.randn(2, 3, requires_grad=needs_noise)
    weight = torch.rand(2, requires_grad=needs_weight)
    loss = ops.eps_loss(prediction, noise, weight=weight, reduction=reduction)
    calls = count_backward_calls(lambda: loss.sum().backward())
    assert calls == (needs_noise or needs_weight or reduction == "none")
    count = 3 if reduction == "none" else 6
    expected = 2 * weight[:, None] * (prediction - noise) / count
    torch.testing.assert_close(prediction.grad, expected.detach())


def test_opcheck() -> None:
    arguments = raw_arguments(torch.randn(2, 3, 4, 4), "seed", 1, 0, torch.rand(2))
    torch.library.opcheck(RAW_BOTH, arguments)
    with pytest.raises(RuntimeError, match="a single loss"):
        RAW_BOTH(*raw_arguments(torch.randn(2, 3), "seed", 0, 0, None))
    with pytest.raises(RuntimeError, match="in float32"):
        RAW_BOTH(*raw_arguments(torch.randn(2, 3).double(), "given", 1, 0, None))
