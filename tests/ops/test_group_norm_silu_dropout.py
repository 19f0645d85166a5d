"""group_norm_silu with dropout: values and gradients against float64, and the mask everywhere."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_harness import assert_close, available, cpp_calls
from op_harness.group_norm_silu import (
    FLOATS,
    GRADIENT_CASES,
    OPERANDS,
    Case,
    Exact,
    arguments,
    grad_output,
    operations,
)
from torch import Tensor

import fastdiff
from fastdiff import ops, reference
from fastdiff.reference.dropout import Dropout, dropout_mask
from fastdiff.reference.group_norm_silu import ACTIVATIONS, group_statistics
from fastdiff.reference.layout import memory_format_of

_module = importlib.import_module("fastdiff.ops.group_norm_silu")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
P = 0.25
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(available("cpu")), reason="the CPU library")),
]


def call(args: dict, **dropout: object) -> Tensor:
    given = dict(args, activation=ACTIVATIONS[args["activation"]])
    return ops.group_norm_silu(**given, **(dropout or {"dropout_p": P, "seed": 7, "stream": 3}))


def mask_of(x: Tensor) -> Tensor:
    return dropout_mask(x, Dropout(64, None, 7, 3))


def with_gradients(args: dict, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    names = ("x", *(name for name in OPERANDS if args[name] is not None))
    args = args | {name: args[name].detach().requires_grad_() for name in names}
    y = call(args)
    found = torch.autograd.grad(y, [args[name] for name in names], grad)
    return y.detach(), dict(zip(names, found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_values_and_gradients(case: Case, backend: str) -> None:
    args = arguments(case)
    x = args["x"]
    grad = grad_output(case, x)
    with fastdiff.use_backend(backend):
        y, gradients = with_gradients(args, grad)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=memory_format_of(x))
    exact, factor = Exact(args), mask_of(x).double() / (1 - P)
    expected, magnitude = exact.forward()
    rounds = 2 + operations(args)
    assert_close(y, expected * factor, magnitude=magnitude / (1 - P), operations=rounds)
    assert not y[factor == 0].any()
    for name, (value, size) in exact.backward(grad.double() * factor, (*gradients,)).items():
        actual = gradients[name]
        assert actual.dtype == args[name].dtype
        if x.dtype != torch.float64 and actual.dtype == torch.float64:
            actual = actual.float()  # computed in float32
        assert_close(actual, value, magnitude=size, operations=2 * rounds)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_mask_whatever_format_batch_and_operands(dtype: str, backend: str) -> None:
    """What is 0 depends on keys, stream and position only (`shift` keeps the rest from 0)."""
    x = torch.randn(5, 12, 7, 9).to(FLOATS[dtype])
    keys = ops.sample_keys(3, 5)

    def zeros(x: Tensor, keys: Tensor, groups: int) -> Tensor:
        shift = x.new_full(x.shape[:2], 100)
        with fastdiff.use_backend(backend):
            y = ops.group_norm_silu(
                x, groups, None, None, shift=shift, dropout_p=0.4, seed=keys, stream=2**40
            )
        return y == 0

    expected = ~dropout_mask(x, Dropout(102, keys, None, 2**40))
    assert torch.equal(zeros(x, keys, 3), expected)
    assert torch.equal(zeros(x, keys, 1), expected)
    assert torch.equal(zeros(x.to(memory_format=torch.channels_last), keys, 4), expected)
    for k in (0, 4):
        assert torch.equal(zeros(x[k : k + 1], keys[k : k + 1], 12), expected[k : k + 1])
    assert torch.equal(zeros(x[::2], keys[::2], 2), expected[::2])  # neither tensor is dense


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [((2, 32, 8, 8), 8, "fp32"), ((1, 32, 100, 90), 2, "bf16"), ((3, 64, 24, 24), 2, "fp16")],
    ids=str,
)
def test_same_bits_whatever_threads_and_batch(
    shape: tuple[int, ...], groups: int, dtype: str, layout: str
) -> None:
    x, grad = (
        torch.randn(shape, generator=torch.Generator().manual_seed(k))
        .to(FLOATS[dtype])
        .contiguous(memory_format=LAYOUTS[layout])
        for k in (0, 1)
    )
    weight, keys = torch.randn(shape[1]), ops.sample_keys(0, shape[0])

    def run(x: Tensor, grad: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = ops.group_norm_silu(x, groups, weight, None, dropout_p=P, seed=keys)
        return y.detach(), *torch.autograd.grad(y, x, grad)

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(x, grad, keys))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = run(x[-1:], grad[-1:], keys[-1:])
    assert all(torch.equal(a[-1:], b) for a, b in zip(results[0], alone, strict=True))


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_results_have_the_same_mask(layout: str) -> None:
    """Written past the caches: the same bits as single samples."""
    x = torch.randn(5, 6, 271, 273).contiguous(memory_format=LAYOUTS[layout])
    keys = ops.sample_keys(0, 5)

    def run(part: slice) -> Tensor:
        return ops.group_norm_silu(x[part], 2, None, None, dropout_p=P, seed=keys[part])

    together = run(slice(0, 5))
    for k in (0, 4):
        assert torch.equal(run(slice(k, k + 1))[0], together[k])


@pytest.mark.parametrize("node", ["C++", "Python"])
@pytest.mark.parametrize("keys", ["seed", "keys"])
def test_nodes(node: str, keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both autograd nodes, once and twice differentiable, with the kernels' gradients."""
    cpp = cpp_calls().group_norm_silu_dropout if node == "C++" else None
    monkeypatch.setattr(_module, "_dropout_op", _module._dropout_op._replace(cpp=cpp))
    args = arguments(Case(shape="odd", dtype="fp64", operand_dtype="fp64"))
    inputs = tuple(args[name].requires_grad_() for name in ("x", *OPERANDS))
    seed = 11 if keys == "seed" else torch.tensor([4, -4, 0])

    def f(x, weight, bias, channel_bias, scale, shift):
        return ops.group_norm_silu(
            x, 3, weight, bias, 1e-5, channel_bias, scale, shift, dropout_p=P, seed=seed, stream=-1
        )

    assert ("CppNode" in f(*inputs).grad_fn.name()) == (node == "C++")
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)
    x = args["x"].detach().requires_grad_()
    y = f(x, *(None,) * 5)
    assert torch.equal(f(x.detach(), *(None,) * 5), y)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    with fastdiff.use_backend("reference"):
        (expected,) = torch.autograd.grad(f(x, *(None,) * 5).sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_functorch() -> None:
    """One key for each sample, under vmap and without it."""
    x, keys = torch.randn(3, 8, 4, 4), torch.tensor([5, 6, 7])

    def loss(x: Tensor, key: Tensor) -> Tensor:
        y = ops.group_norm_silu(x[None], 2, None, None, dropout_p=0.5, seed=key[None])
        return y.square().sum()

    leaf = x.clone().requires_grad_()
    y = ops.group_norm_silu(leaf, 2, None, None, dropout_p=0.5, seed=keys)
    (expected,) = torch.autograd.grad(y.square().sum(), leaf)
    gradients = torch.func.vmap(torch.func.grad(loss))(x, keys)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", [True, False])
def test_opcheck(layout: str, keys: bool) -> None:
    args = arguments(Case(shape="odd", layout=layout))
    dropout = (64, ops.sample_keys(1, 3), None, 2) if keys else (64, None, 1, 2)
    x, groups, weight, bias, eps, *others = args.values()
    small = (weight, bias, *others[:-1])
    mean, rstd = group_statistics(x, groups, eps, others[0])
    torch.library.opcheck(
        torch.ops.fastdiff.group_norm_silu_dropout_backward.default,
        (torch.ones_like(x), x, mean, rstd, groups, *small, 0, *[True] * 6, *dropout),
    )
    for tensor in (x, *small):
        tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.fastdiff.group_norm_silu_dropout.default, (*args.values(), *dropout)
    )


def test_compiles_once_for_all_keys_seeds_and_batches() -> None:
    torch._dynamo.reset()
    graphs = []

    def recorded(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def f(x: Tensor, seed: int | Tensor, stream: int) -> Tensor:
        return ops.group_norm_silu(x * 1, 4, None, None, dropout_p=P, seed=seed, stream=stream)

    for kind in ("keys", "seed"):
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=recorded)
        for batch, number in ((5, 3), (4, 2**40), (7, -5)):
            x = torch.randn(batch, 8, 6, 6)
            seed = ops.sample_keys(number, batch) if kind == "keys" else number
            assert torch.equal(compiled(x, seed, number + 1), f(x, seed, number + 1))
    assert len(graphs) == 2, f"{len(graphs)} graphs: something recompiled"


def test_compiles_with_inductor_and_gradients() -> None:
    torch._dynamo.reset()
    x, keys = torch.randn(2, 8, 5, 5, requires_grad=True), torch.tensor([3, 4])

    def loss(x: Tensor, keys: Tensor) -> Tensor:
        return ops.group_norm_silu(x * 2, 4, None, None, dropout_p=P, seed=keys).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for k in (0, 1):
        (eager,) = torch.autograd.grad(loss(x, keys + k), x)
        (found,) = torch.autograd.grad(compiled(x, keys + k), x)
        torch.testing.assert_close(found, eager)


def test_no_dropout_is_the_op_without_it() -> None:
    x = torch.randn(2, 8, 3, 3)
    plain = ops.group_norm_silu(x, 2, None, None)
    for seed in (None, 3, "not looked at"):
        y = ops.group_norm_silu(x, 2, None, None, dropout_p=0.0, seed=seed)
        assert torch.equal(y, plain)


BAD = [
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, expected 0 <= p < 1"),
    ({"dropout_p": -0.5}, ValueError, "dropout_p is -0.5, expected"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p is '0.1', expected a float"),
    ({"dropout_p": True}, TypeError, "dropout_p is True, expected a float"),
    ({"seed": None}, ValueError, r"seed is None, expected an int or keys \(B,\)"),
    ({"seed": 0.5}, TypeError, "seed is 0.5, expected an int"),
    ({"seed": torch.zeros(2)}, TypeError, "seed has dtype torch.float32, expected torch.int64"),
    ({"seed": torch.zeros(3).long()}, ValueError, r"seed has shape \(3,\), expected \(2,\)"),
    ({"seed": torch.zeros(2, device="meta").long()}, ValueError, "seed is on meta"),
    ({"stream": 1.5}, TypeError, "stream is 1.5, expected an int"),
]


@pytest.mark.parametrize("function", [ops.group_norm_silu, reference.group_norm_silu])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict, error: type, message: str, function) -> None:
    x = torch.zeros(2, 8, 3, 3)
    with pytest.raises(error, match=f"group_norm_silu: {message}"):
        function(x, 2, None, None, **{"dropout_p": 0.1, "seed": 0, **change})


@pytest.mark.parametrize(
    "dropout",
    [(0, None, 1, 0), (256, None, 1, 0), (9, None, None, 0), (9, torch.zeros(2).long(), 1, 0),
     (9, torch.zeros(3).long(), None, 0), (9, torch.zeros(2), None, 0)],
)  # fmt: skip
def test_raw_operators_refuse(dropout: tuple) -> None:
    x, statistic = torch.zeros(2, 8, 3, 3), torch.zeros(2, 2)
    none = (None,) * 5
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.ops.fastdiff.group_norm_silu_dropout(x, 2, *none[:2], 1e-5, *none[2:], 0, *dropout)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.ops.fastdiff.group_norm_silu_dropout_backward(
            x, x, statistic, statistic, 2, *none, 0, True, *[False] * 5, *dropout
        )
