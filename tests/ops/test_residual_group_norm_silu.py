"""residual_group_norm_silu: the sum bit for bit, y and all gradients against float64."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from op_harness import assert_close, available, cpp_calls, unit_roundoff
from op_harness.group_norm_silu import (
    FLOATS,
    GRADIENT_CASES,
    Case,
    Exact,
    arguments,
    grad_output,
    operations,
)
from torch import Tensor

import fastdiff
from fastdiff import ops, reference
from fastdiff.reference.group_norm_silu import ACTIVATIONS, group_statistics
from fastdiff.reference.layout import memory_format_of

_module = importlib.import_module("fastdiff.ops.residual_group_norm_silu")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OPERANDS = ("weight", "bias", "scale", "shift")
NAMES = ("x", "residual", *OPERANDS, "sum_bias")
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(available("cpu")), reason="the CPU library")),
]
CASES = [case for case in GRADIENT_CASES if "channel_bias" in case.operands or not case.operands]


def inputs_of(case: Case) -> dict:
    """Of the public function, with a residual in another memory format and a bias."""
    args = arguments(case)
    x = args["x"]
    generator = torch.Generator().manual_seed(3)
    other = torch.channels_last if memory_format_of(x) == torch.contiguous_format else None
    residual = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    if other is not None and x.dim() == 4:
        residual = residual.to(memory_format=other)
    sum_bias = None
    if case.operands:
        sum_bias = torch.randn(x.shape[1], generator=generator).to(FLOATS[case.operand_dtype])
    order = ("x", "residual", "num_groups", "weight", "bias", "eps", "scale", "shift", "activation")
    given = args | {"residual": residual, "activation": ACTIVATIONS[args["activation"]]}
    return {name: given[name] for name in order} | {"sum_bias": sum_bias}


def given_names(inputs: dict) -> tuple[str, ...]:
    return tuple(name for name in NAMES if inputs[name] is not None)


def with_gradients(inputs: dict, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict]:
    names = given_names(inputs)
    inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in names}
    summed, y = ops.residual_group_norm_silu(**inputs)
    found = torch.autograd.grad((summed, y), [inputs[name] for name in names], grads)
    return summed.detach(), y.detach(), dict(zip(names, found, strict=True))


def eager_sum(inputs: dict) -> Tensor:
    x, bias = inputs["x"], inputs["sum_bias"]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    summed = x.to(wide) + inputs["residual"].to(wide)
    if bias is not None:
        summed = summed + bias.to(wide).reshape(-1, *[1] * (x.dim() - 2))
    return summed.to(x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, backend: str) -> None:
    inputs = inputs_of(case)
    x = inputs["x"]
    grad = grad_output(case, x)
    grad_sum = grad_output(case, x).flip(1)
    with fastdiff.use_backend(backend):
        summed, y, gradients = with_gradients(inputs, (grad_sum, grad))
        again = ops.group_norm_silu(
            summed, inputs["num_groups"], inputs["weight"], inputs["bias"], inputs["eps"], None,
            inputs["scale"], inputs["shift"], inputs["activation"],
        )  # fmt: skip
    assert torch.equal(summed, eager_sum(inputs))
    assert torch.equal(y, again)
    for result in (summed, y, *([gradients["x"]] if backend == "cpu" else [])):
        assert result.dtype == x.dtype
        assert result.is_contiguous(memory_format=memory_format_of(x))
    assert torch.equal(gradients["x"], gradients["residual"])
    args = arguments(case) | {"x": summed, "channel_bias": None}
    exact, rounds = Exact(args), operations(args)
    if backend == "reference" and x.dtype != torch.float64:
        # Autograd rounds the norm's gradient before it adds the other one.
        rounds += int(unit_roundoff(x.dtype) / unit_roundoff(torch.float32))
    names = ("x", *(name for name in OPERANDS if inputs[name] is not None))
    expected = exact.backward(grad, names)
    value, size = expected["x"]
    value, size = value + grad_sum.double(), size + grad_sum.double().abs()
    expected["x"] = value, size
    if inputs["sum_bias"] is not None:
        expected["sum_bias"] = tuple(t.flatten(2).sum((0, 2)) for t in (value, size))
    for name, (value, size) in expected.items():
        actual = gradients[name]
        assert actual.dtype == inputs[name].dtype
        if x.dtype != torch.float64 and actual.dtype == torch.float64:
            actual = actual.float()  # computed in float32
        assert_close(actual, value, magnitude=size, operations=2 * rounds)


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [((2, 32, 8, 8), 8, "fp32"), ((1, 32, 100, 90), 2, "bf16"), ((3, 64, 24, 24), 2, "fp16"),
     ((5, 6, 271, 273), 2, "fp32")],
    ids=str,
)  # fmt: skip
def test_same_bits_whatever_threads_and_batch(
    shape: tuple[int, ...], groups: int, dtype: str, layout: str
) -> None:
    """The last shape's results are written past the caches."""
    x, residual, grad_sum, grad = (
        torch.randn(shape, generator=torch.Generator().manual_seed(k))
        .to(FLOATS[dtype])
        .contiguous(memory_format=LAYOUTS[layout])
        for k in range(4)
    )
    inputs = {"num_groups": groups, "weight": torch.randn(shape[1]), "bias": None, "scale": None}
    inputs |= {"shift": None, "sum_bias": torch.randn(shape[1])}

    def run(part: slice) -> list[Tensor]:
        summed, y, gradients = with_gradients(
            {"x": x[part], "residual": residual[part], **inputs}, (grad_sum[part], grad[part])
        )
        return [summed, y, gradients.pop("x"), *gradients.values()]

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(slice(None)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = run(slice(-1, None))
    assert all(torch.equal(a[-1:], b) for a, b in zip(results[0][:3], alone[:3], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_constant_groups_are_exact(dtype: str, layout: str) -> None:
    """A sum that is constant in a group is normalized to 0, whatever made it constant."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-64, 65, (2, 8, 9, 7), generator=generator).to(FLOATS[dtype]) / 8
    x = x.contiguous(memory_format=LAYOUTS[layout])
    bias = torch.arange(8) % 4 * 0.25
    residual = 3.125 - x - bias.to(x.dtype)[:, None, None]  # exact in every dtype
    shift = torch.randn(2, 8, generator=generator)
    summed, y = ops.residual_group_norm_silu(
        x, residual, 2, None, None, shift=shift, activation="identity", sum_bias=bias
    )
    assert torch.equal(summed, torch.full_like(x, 3.125))
    assert torch.equal(y, shift.to(x.dtype)[..., None, None].expand_as(y))


@pytest.mark.parametrize("used", ["sum", "y", "both"])
def test_nodes_for_every_choice_of_gradients(used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ and Python do the same: the same bits, and gradients for those who asked."""
    inputs = inputs_of(Case(shape="odd"))
    subsets = [s for n in (1, 2, 7) for s in itertools.combinations(NAMES, n)]
    for wanted in subsets:
        found = []
        for cpp in (cpp_calls().residual_group_norm_silu, None):
            monkeypatch.setattr(_module, "_op", _module._op._replace(cpp=cpp))
            leaves = {k: inputs[k].detach().requires_grad_(k in wanted) for k in NAMES}
            summed, y = ops.residual_group_norm_silu(**(inputs | leaves))
            assert ("CppNode" in y.grad_fn.name()) == (cpp is not None)
            loss = sum(
                (t * torch.linspace(-1, 2, t.numel()).view_as(t)).sum()
                for name, t in (("sum", summed), ("y", y))
                if used in (name, "both")
            )
            loss.backward()
            got = {k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}
            assert set(got) <= set(wanted)
            found.append([summed.detach(), y.detach(), *got.values()])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("node", ["C++", "Python"])
def test_second_derivatives(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp = cpp_calls().residual_group_norm_silu if node == "C++" else None
    monkeypatch.setattr(_module, "_op", _module._op._replace(cpp=cpp))
    inputs = inputs_of(Case(shape="odd", dtype="fp64", operand_dtype="fp64"))
    tensors = tuple(inputs[name].requires_grad_() for name in NAMES)

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ops.residual_group_norm_silu(**(inputs | dict(zip(NAMES, tensors, strict=True))))

    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: f(*t)[1], tensors, fast_mode=True)


def test_one_tensor_as_both_summands() -> None:
    x = torch.randn(2, 8, 3, 3).double().requires_grad_()

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.residual_group_norm_silu(x, x, 2, None, None)

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


def test_functorch_and_forward_mode() -> None:
    x, residual = torch.randn(2, 3, 8, 4, 4).double().unbind()

    def loss(x: Tensor, residual: Tensor) -> Tensor:
        summed, y = ops.residual_group_norm_silu(x[None], residual[None], 2, None, None)
        return y.square().sum() + summed.sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=1))(x, residual)
    leaf = residual.clone().requires_grad_()
    summed, y = ops.residual_group_norm_silu(x, leaf, 2, None, None)
    (expected,) = torch.autograd.grad(y.square().sum() + summed.sum(), leaf)
    torch.testing.assert_close(found, expected)
    _, tangent = torch.func.jvp(lambda x: loss(x[0], x[0]), (x,), (x,))
    assert tangent.isfinite()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    inputs = inputs_of(Case(shape="odd", layout=layout)) | {"activation": 0}
    names = ("weight", "bias", "scale", "shift")
    summed = eager_sum(inputs).contiguous(memory_format=LAYOUTS[layout])
    statistics = group_statistics(summed, inputs["num_groups"], 1e-5)
    for grad_sum in (torch.ones_like(summed), None):
        torch.library.opcheck(
            torch.ops.fastdiff.residual_group_norm_silu_backward.default,
            (
                torch.ones_like(summed), grad_sum, summed, *statistics, inputs["num_groups"],
                *(inputs[name] for name in names), 0, inputs["sum_bias"], *[True] * 6,
            ),
        )  # fmt: skip
    for name in NAMES:
        inputs[name].requires_grad_()
    torch.library.opcheck(
        torch.ops.fastdiff.residual_group_norm_silu.default, tuple(inputs.values())
    )


def test_compiles_once_for_every_batch_and_with_gradients() -> None:
    torch._dynamo.reset()
    graphs = []

    def recorded(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def f(x: Tensor, residual: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.residual_group_norm_silu(x * 1, residual, 4, None, None, sum_bias=bias)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=recorded)
    bias = torch.randn(8)
    for batch in (5, 4, 7):
        x, residual = torch.randn(2, batch, 8, 6, 6).unbind()
        for one, other in zip(compiled(x, residual, bias), f(x, residual, bias), strict=True):
            assert torch.equal(one, other)
    assert len(graphs) == 1, f"{len(graphs)} graphs: something recompiled"
    inputs = [t.requires_grad_() for t in (*torch.randn(2, 2, 8, 6, 6).unbind(), bias)]
    results = []
    for function in (f, torch.compile(f, fullgraph=True)):
        summed, y = function(*inputs)
        results.append(torch.autograd.grad(summed.square().sum() + y.square().sum(), inputs))
    torch.testing.assert_close(*results)


X = torch.zeros(2, 8, 3, 3)
BAD = [
    ({"x": X.int()}, TypeError, "x has dtype torch.int32"),
    ({"residual": X.half()}, TypeError, "residual has dtype torch.float16, expected torch.float32"),
    ({"residual": X[:1]}, ValueError, r"residual has shape \(1, 8, 3, 3\), expected \(2, 8, 3, 3"),
    ({"residual": None}, TypeError, "residual is None, expected a torch.Tensor"),
    ({"residual": X.to("meta")}, ValueError, "residual is on meta"),
    ({"sum_bias": torch.zeros(4)}, ValueError, r"sum_bias has shape \(4,\), expected \(C,\) = "),
    ({"sum_bias": torch.zeros(2, 8)}, ValueError, r"sum_bias has shape \(2, 8\)"),
    ({"sum_bias": torch.zeros(8).int()}, TypeError, "sum_bias has dtype torch.int32"),
    ({"sum_bias": [0.0] * 8}, TypeError, "sum_bias is a list"),
    ({"num_groups": 3}, ValueError, "num_groups is 3, expected a divisor"),
    ({"eps": 0.0}, ValueError, "eps is 0.0"),
    ({"scale": torch.zeros(8)}, ValueError, r"scale has shape \(8,\)"),
    ({"activation": "relu"}, ValueError, "unknown activation 'relu'"),
]


@pytest.mark.parametrize(
    "function", [ops.residual_group_norm_silu, reference.residual_group_norm_silu]
)
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict, error: type, message: str, function) -> None:
    good = {"x": X, "residual": X, "num_groups": 2, "weight": None, "bias": None}
    with pytest.raises(error, match=f"residual_group_norm_silu: {message}"):
        function(**{**good, **change})


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_raw_operator_refuses_bad_input(change: dict, error: type, message: str) -> None:
    args = inputs_of(Case()) | dict.fromkeys((*OPERANDS, "sum_bias"))
    args |= {"x": X, "residual": X, "num_groups": 2, "activation": 0}
    args |= {k: 2 if k == "activation" else v for k, v in change.items()}
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)):
        torch.ops.fastdiff.residual_group_norm_silu.default(*args.values())
