"""All ops under torch.func: vmap over every dimension of every operand, nested, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_harness import exact
from op_harness.raw_arguments import arguments
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.reference.layout import memory_format_of

OPS = tuple(exact.PUBLIC)
N = 3


def float_arguments(op: str) -> dict[str, Any]:
    return {
        k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in arguments(op).items()
    }


def function(op: str, args: dict[str, Any], names: tuple[str, ...]) -> Callable[..., Tensor]:
    """The op's outputs, in one vector, of the operands called `names`."""

    def f(*operands: Tensor) -> Tensor:
        found = exact.PUBLIC[op](args | dict(zip(names, operands, strict=True)))
        found = found if isinstance(found, tuple) else (found,)
        return torch.cat([x.reshape(-1) for x in found])

    return f


def versions(x: Tensor, *sizes: int) -> Tensor:
    """x with leading dimensions, in which its values differ (whole numbers and flags: turned)."""
    if not x.is_floating_point():
        turned = [x.roll(k, 0) for k in range(torch.Size(sizes).numel())]
        return torch.stack(turned).reshape(*sizes, *x.shape)
    factors = 1 + torch.arange(torch.Size(sizes).numel()).reshape(*sizes, *[1] * x.dim()) / 8
    return x * factors


def tensors(op: str) -> tuple[str, ...]:
    return tuple(k for k, x in arguments(op).items() if isinstance(x, Tensor))


def looped(f: Callable[..., Tensor], stacked: list[Tensor], count: int) -> Tensor:
    return torch.stack([f(*(x[k] for x in stacked)) for k in range(count)])


# A few roundings of float32 between two orders of the same sums.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_every_dimension_of_every_operand(op: str) -> None:
    args = float_arguments(op)
    for name in tensors(op):
        f = function(op, args, (name,))
        stacked = versions(args[name], N)
        expected = looped(f, [stacked], N)
        for d in range(stacked.dim()):
            moved = stacked.movedim(0, d)
            for given in (moved, moved.contiguous()):
                torch.testing.assert_close(torch.vmap(f, in_dims=d)(given), expected, **CLOSE)


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_all_operands_nested_and_in_chunks(op: str) -> None:
    args = float_arguments(op)
    names = tensors(op)
    f = function(op, args, names)
    stacked = [versions(args[name], 2, N) for name in names]
    expected = torch.stack([looped(f, [x[k] for x in stacked], N) for k in range(2)])
    for chunk_size in (None, 1, 2):
        nested = torch.vmap(torch.vmap(f, chunk_size=chunk_size), randomness="same")
        torch.testing.assert_close(nested(*stacked), expected, **CLOSE)
    crossed = torch.vmap(torch.vmap(f), in_dims=1, out_dims=1, randomness="different")
    torch.testing.assert_close(crossed(*stacked), expected, **CLOSE)


@pytest.mark.parametrize("op", ["q_sample", "eps_loss", "vlb_terms", "ddim_step", "ddpm_step"])
def test_noise_from_keys_and_seeds_under_vmap(op: str) -> None:
    """Made from the key, not from a generator: no mode of randomness matters."""
    args = float_arguments(op) | {"noise": None}
    main = next(iter(args))
    keys = ops.sample_keys(3, 2 * N).view(N, 2)
    stacked = versions(args[main], N)
    for randomness in ("error", "different", "same"):
        f = function(op, args, (main, "keys"))
        found = torch.vmap(f, randomness=randomness)(stacked, keys)
        torch.testing.assert_close(found, looped(f, [stacked, keys], N), **CLOSE)
        f = function(op, args | {"seed": 5}, (main,))
        found = torch.vmap(f, randomness=randomness)(stacked)
        torch.testing.assert_close(found, looped(f, [stacked], N), **CLOSE)


def test_normals_of_keys_under_vmap() -> None:
    """Which has no tensor operands but the keys, and fills its result."""
    keys = ops.sample_keys(3, 6).reshape(3, 2)
    found = torch.vmap(lambda k: ops.philox_normal((2, 1, 4, 4), seed=k))(keys)
    expected = torch.stack([ops.philox_normal((2, 1, 4, 4), seed=k) for k in keys])
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * 2.0**-24 * 6)


@pytest.mark.parametrize("op", OPS)
def test_gradients_inside_and_outside_of_vmap(op: str) -> None:
    args = arguments(op)
    names = exact.differentiable(op, args)
    f = function(op, args, names)
    stacked = [versions(args[name], N) for name in names]

    def loss(*operands: Tensor) -> Tensor:
        found = f(*operands)
        return (found * torch.linspace(1, 2, found.numel(), dtype=torch.float64)).sum()

    def leaves(k: int) -> list[Tensor]:
        return [x[k].detach().clone().requires_grad_() for x in stacked]

    which = tuple(range(len(names)))
    expected = []
    for k in range(N):
        inputs = leaves(k)
        expected.append(torch.autograd.grad(loss(*inputs), inputs))
    per_sample = torch.vmap(torch.func.grad(loss, which))(*stacked)
    of_all = torch.func.grad(lambda *x: torch.vmap(loss)(*x).sum(), which)(*stacked)
    for found in (per_sample, of_all):
        for i, gradient in enumerate(found):
            wanted = torch.stack([e[i] for e in expected])
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", OPS)
def test_jacobians(op: str) -> None:
    """Forward and reverse mode agree, and vjp and jvp with them."""
    args = arguments(op)
    name = exact.DIFFERENTIABLE[op][0]
    f = function(op, args, (name,))
    x = args[name]
    forward, reverse = torch.func.jacfwd(f)(x), torch.func.jacrev(f, chunk_size=5)(x)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-9)
    tangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    out, pushed = torch.func.jvp(f, (x,), (tangent,))
    wanted = torch.tensordot(forward, tangent, x.dim())
    torch.testing.assert_close(pushed, wanted, rtol=1e-9, atol=1e-9)
    _, pull = torch.func.vjp(f, x)
    cotangent = torch.linspace(1, 2, out.numel(), dtype=out.dtype)
    wanted = torch.tensordot(cotangent, reverse, 1)
    torch.testing.assert_close(pull(cotangent)[0], wanted, rtol=1e-9, atol=1e-9)


def test_memory_format_inside_of_transforms() -> None:
    """Only what vmap batches has none: a gradient keeps channels_last."""
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(memory_format_of(x))
        return ops.group_norm_silu(x, 1, None, None).sum()

    torch.func.grad(f)(x)
    torch.vmap(torch.func.grad(f))(x[None])
    torch.func.grad(lambda x: torch.vmap(f)(x[None]).sum())(x)
    assert seen == [torch.channels_last, torch.contiguous_format, torch.contiguous_format]


def test_ensemble_of_patched_networks() -> None:
    def network() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU()
        )

    plain = [network() for _ in range(N)]
    patched = [network() for _ in range(N)]
    for a, b in zip(plain, patched, strict=True):
        b.load_state_dict(a.state_dict())
        assert fastdiff.patch(b).replaced
    x = torch.randn(N, 2, 3, 6, 6)
    states = torch.func.stack_module_state(patched)

    def call(state: dict, buffers: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(patched[0], (state, buffers), (x,))

    expected = torch.stack([net(x[k]) for k, net in enumerate(plain)])
    for d in range(x.dim()):
        given = x.movedim(0, d)
        found = torch.vmap(call, in_dims=(0, 0, d))(*states, given)
        torch.testing.assert_close(found, expected, **CLOSE)
