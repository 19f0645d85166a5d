"""What autograd asks of ops on a device beyond one backward pass, and what they refuse there."""

from __future__ import annotations

import pytest
import torch
from gpu.needs import GPU
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, ops

pytestmark = GPU


def operands(device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 8, 5, 3), "weight": (8,), "bias": (8,), "channel_bias": (2, 8)}
    shapes |= {"scale": (2, 8), "shift": (2, 8)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.to(device).requires_grad_() for name, value in made.items()}


def second_gradients(device: str) -> dict[str, Tensor]:
    """Of the sum of squares of the first gradients."""
    inputs = operands(device)
    x, rest = inputs["x"], {k: v for k, v in inputs.items() if k != "x"}
    y = ops.group_norm_silu(x, 4, rest.pop("weight"), rest.pop("bias"), **rest)
    first = torch.autograd.grad(y.pow(2).sum(), list(inputs.values()), create_graph=True)
    found = torch.autograd.grad(sum(g.pow(2).sum() for g in first), list(inputs.values()))
    return dict(zip(inputs, (g.cpu() for g in found), strict=True))


def test_gradients_of_gradients(backend: str) -> None:
    """Those of the CPU's reference, to some hundred roundings of its largest."""
    with fastdiff.use_backend("reference"):
        expected = second_gradients("cpu")
    with fastdiff.use_backend(backend):
        found = second_gradients("cuda")
    for name, value in expected.items():
        atol = 500 * 2.0**-24 * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


def test_no_gradient_comes_back(backend: str) -> None:
    inputs = operands("cuda")
    x, weight = inputs["x"], inputs["weight"]
    with fastdiff.use_backend(backend):
        y = NoGradient.apply(ops.group_norm_silu(x, 4, weight, inputs["bias"]))
        (y.sum() + 3 * x.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert weight.grad is None or not weight.grad.any()


def test_terms_with_and_without_autograd_are_the_same(backend: str) -> None:
    table = NoiseSchedule.linear(1000).ddpm_table(torch.arange(1000), variance="fixed_large")
    generator = torch.Generator().manual_seed(0)
    x0, x_t, output = (torch.randn(2, 3, 8, 8, generator=generator).cuda() for _ in range(3))
    t = torch.tensor([0, 700], device="cuda")
    with fastdiff.use_backend(backend):
        recorded = ops.vlb_terms(x0, x_t, output.requires_grad_(), t, table.cuda(), seed=3)
        with torch.no_grad():
            plain = ops.vlb_terms(x0, x_t, output, t, table.cuda(), seed=3)
    for one, other in zip(recorded, plain, strict=True):
        assert one.requires_grad
        assert torch.equal(one, other)


REFUSED = {
    "q_sample": lambda x, t, a: ops.q_sample(x, t.float(), a, a, noise=x),
    "posterior_mean": lambda x, t, a: ops.posterior_mean(x, x[:1], t, a, a),
    "philox_normal": lambda x, t, a: ops.philox_normal((2,), device="cuda", dtype=t.dtype, seed=1),
    "eps_loss": lambda x, t, a: ops.eps_loss(x, x[:1]),
    "ddim_step": lambda x, t, a: ops.ddim_step(x, x[:1], t, a),
    "group_norm_silu": lambda x, t, a: ops.group_norm_silu(x, 5, None, None),
    "another device": lambda x, t, a: ops.group_norm_silu(x, 4, torch.ones(8), None),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(case: str, backend: str) -> None:
    """With the same words on every device, and nothing is left broken."""
    said = {}
    for device, name in (("cuda", backend), ("cpu", "reference")):
        if case in ("another device", "philox_normal") and device == "cpu":
            continue
        x = torch.randn(2, 8, 4, 4, device=device)
        t, a = torch.tensor([0, 5], device=device), torch.linspace(1, 0.1, 10, device=device)
        with fastdiff.use_backend(name), pytest.raises((ValueError, TypeError, RuntimeError)) as e:
            REFUSED[case](x, t, a)
        said[device] = f"{type(e.value).__name__}: {e.value}".replace(device, "DEVICE")
    assert len(set(said.values())) == 1, said
    torch.cuda.synchronize()
    with fastdiff.use_backend(backend):
        assert (
            ops.group_norm_silu(torch.randn(2, 8, 4, 4, device="cuda"), 4, None, None)
            .isfinite()
            .all()
        )


def test_a_backend_of_another_device_is_refused() -> None:
    with (
        fastdiff.use_backend("cpu"),
        pytest.raises(RuntimeError, match="was asked for, but"),
    ):
        ops.group_norm_silu(torch.randn(2, 8, 4, 4, device="cuda"), 4, None, None)
