"""group_norm_silu: every implementation against float64, forward and gradients."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from op_harness import assert_close, available, evaluate, implementation_params
from op_harness.group_norm_silu import (
    CASES,
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
from fastdiff.reference.group_norm_silu import ACTIVATIONS, group_statistics
from fastdiff.reference.layout import memory_format_of

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Triton's on a CPU are in test_group_norm_silu_triton.py.
IMPLEMENTATIONS = ("reference", "cpu", "cuda-ptx", "cuda", "triton")
FLOAT64 = ("reference", "cpu")


def case_params(cases: list[Case]) -> list[Any]:
    """(case, implementation) for all; float64 kernels exist on the CPU only."""
    return [
        pytest.param(case, name, marks=param.marks, id=f"{case}-{name}")
        for case in cases
        for param in implementation_params(*IMPLEMENTATIONS)
        for name in param.values
        if case.dtype != "fp64" or name in FLOAT64
    ]


@pytest.mark.parametrize(("case", "implementation"), case_params(CASES))
def test_forward(case: Case, implementation: str) -> None:
    args = arguments(case)
    y, mean, rstd = evaluate("group_norm_silu", implementation, args).outputs
    x = args["x"]
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=memory_format_of(x))
    exact = Exact(args)
    expected, magnitude = exact.forward()
    assert_close(
        y,
        expected,
        magnitude=magnitude,
        operations=operations(args),
        implementation=implementation,
    )
    for actual, (value, size) in zip((mean, rstd), exact.statistics(), strict=True):
        assert actual.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert_close(actual, value, magnitude=size, operations=operations(args))


@pytest.mark.parametrize(("case", "implementation"), case_params(GRADIENT_CASES))
def test_gradients(case: Case, implementation: str) -> None:
    args = arguments(case)
    names = ("x", *(name for name in OPERANDS if args[name] is not None))
    grad = grad_output(case, args["x"])
    result = evaluate("group_norm_silu", implementation, args, gradients=names, grad_output=grad)
    for name, (value, size) in Exact(args).backward(grad, names).items():
        actual = result.gradients[name]
        assert actual.dtype == args[name].dtype
        if args["x"].dtype != torch.float64 and actual.dtype == torch.float64:
            assert torch.equal(actual, actual.float().double())  # computed in float32
            actual = actual.float()
        if name == "x":
            assert actual.is_contiguous(memory_format=memory_format_of(args["x"]))
        assert_close(
            actual,
            value,
            magnitude=size,
            operations=2 * operations(args),
            implementation=implementation,
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_formula_of_the_reference(layout: str, activation: str) -> None:
    """Written out, it is what autograd makes of the forward formula."""
    args = arguments(Case(shape="odd", layout=layout, dtype="fp64", operand_dtype="fp64"))
    x, groups, weight, bias, eps, channel_bias, scale, shift, _ = args.values()
    operands = (weight, bias, channel_bias, scale, shift)
    inputs = [t.clone().requires_grad_() for t in (x, *operands)]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    y = reference.group_norm_silu(inputs[0], groups, *inputs[1:3], eps, *inputs[3:], activation)
    expected = torch.autograd.grad(y, inputs, grad)
    mean, rstd = group_statistics(x, groups, eps, channel_bias)
    found = reference.group_norm_silu_backward(grad, x, mean, rstd, groups, *operands, activation)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def forward_and_gradients(args: dict) -> list[Tensor]:
    names = ("x", *(name for name in OPERANDS if args[name] is not None))
    grad = torch.linspace(-1, 1, args["x"].numel()).reshape(args["x"].shape).to(args["x"].dtype)
    result = evaluate("group_norm_silu", "cpu", args, gradients=names, grad_output=grad)
    return [*result.outputs, *result.gradients.values()]


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("shape", ["vectors", "large group", "many pixels"])
def test_same_bits_whatever_the_threads(shape: str, dtype: str, layout: str) -> None:
    """One thread takes whole groups, several share one: sums are cut and added in the same way."""
    args = arguments(Case(layout=layout, dtype=dtype))
    if shape == "many pixels":  # rows of several pieces
        x = torch.randn(1, 32, 100, 90, generator=torch.Generator().manual_seed(0))
        args |= {"x": x.to(FLOATS[dtype], memory_format=LAYOUTS[layout]), "num_groups": 2}
        args |= {name: args[name][:1] for name in ("channel_bias", "scale", "shift")}
    elif shape == "large group":
        args = arguments(Case(shape=shape, layout=layout, dtype=dtype))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(forward_and_gradients(args))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "implementation", implementation_params(*(n for n in IMPLEMENTATIONS if n != "reference"))
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["vectors", "odd"])
def test_a_sample_does_not_depend_on_its_batch(
    shape: str, layout: str, implementation: str
) -> None:
    case = Case(shape=shape, layout=layout)
    args = arguments(case)
    names = ("x", "channel_bias", "scale", "shift")
    grad = grad_output(case, args["x"])
    many = evaluate("group_norm_silu", implementation, args, gradients=names, grad_output=grad)
    alone = {k: v[-1:] if k in names else v for k, v in args.items()}
    one = evaluate("group_norm_silu", implementation, alone, gradients=names, grad_output=grad[-1:])
    for whole, part in zip(many.outputs, one.outputs, strict=True):
        assert torch.equal(whole[-1:], part)
    for name in names:
        assert torch.equal(many.gradients[name][-1:], one.gradients[name])


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 6, 271, 273), "fp32"), ((5, 32, 160, 173), "bf16")],
    ids=["unaligned", "aligned"],
)
def test_large_results_are_those_of_single_samples(
    shape: tuple[int, ...], dtype: str, layout: str
) -> None:
    """Results that caches do not hold are written past them, by other stores: the same bits."""
    x, grad = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        .to(FLOATS[dtype])
        .contiguous(memory_format=LAYOUTS[layout])
        for seed in (0, 1)
    )

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = ops.group_norm_silu(x, 2, None, None)
        return y.detach(), *torch.autograd.grad(y, x, grad)

    together = run(x, grad)
    for k in (0, 4):
        for one, all_of_them in zip(run(x[k : k + 1], grad[k : k + 1]), together, strict=True):
            assert torch.equal(one[0], all_of_them[k])


@pytest.mark.parametrize("values", ["normal", "std 1000"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_errors_are_not_larger_than_eagers(dtype: str, layout: str, values: str) -> None:
    case = Case(
        shape="large group",
        layout=layout,
        dtype=dtype,
        values=values,
        operands=("weight", "bias"),
        operand_dtype=dtype,
    )
    args = arguments(case)
    exact = Exact(args)
    grad = grad_output(case, args["x"])
    names = ("x", "weight", "bias")
    expected = {"y": exact.forward()[0]}
    expected |= {name: value for name, (value, _) in exact.backward(grad, names).items()}

    def errors(function) -> dict[str, float]:
        x, weight, bias = (args[name].detach().clone().requires_grad_() for name in names)
        y = function(x, args["num_groups"], weight, bias, args["eps"])
        found = {
            "y": y,
            **dict(zip(names, torch.autograd.grad(y, (x, weight, bias), grad), strict=True)),
        }
        return {k: (v.double() - expected[k]).norm().item() for k, v in found.items()}

    fused = errors(ops.group_norm_silu)
    eager = errors(lambda *inputs: F.silu(F.group_norm(*inputs)))
    for name in fused:
        print(f"{case}: error of {name}: fused {fused[name]:.4g}, eager {eager[name]:.4g}")
        assert fused[name] <= 1.02 * eager[name]  # both end in the same rounding


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_differentiable_twice(layout: str, activation: str) -> None:
    args = arguments(Case(shape="odd", layout=layout, dtype="fp64", operand_dtype="fp64"))
    inputs = tuple(args[name].requires_grad_() for name in ("x", *OPERANDS))

    def f(x, weight, bias, channel_bias, scale, shift):
        return ops.group_norm_silu(x, 3, weight, bias, 1e-5, channel_bias, scale, shift, activation)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_one_tensor_as_two_arguments() -> None:
    x = torch.randn(2, 8, 3, 3).double()
    time = torch.randn(2, 8).double().requires_grad_()

    def f(time: Tensor) -> Tensor:
        return ops.group_norm_silu(x, 2, None, None, scale=time, shift=time)

    assert torch.autograd.gradcheck(f, (time,))
    assert torch.autograd.gradgradcheck(f, (time,))


def test_forward_mode_and_functorch() -> None:
    x, tangent = torch.randn(2, 3, 8, 5, 5, dtype=torch.float64).unbind(0)
    weight, bias = torch.randn(2, 8, dtype=torch.float64).unbind(0)

    def f(x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, 2, weight, bias)

    _, found = torch.func.jvp(f, (x,), (tangent,))
    step = 1e-6
    differences = (f(x + step * tangent) - f(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, differences, rtol=1e-6, atol=1e-6)
    gradient = torch.func.grad(lambda x: f(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf).square().sum(), leaf)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("operands", [OPERANDS, ("weight", "bias"), ()], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ("odd", "contiguous"),
        ("odd", "channels_last"),
        ("3-D", "contiguous"),
        ("5-D", "channels_last"),
    ],
)
def test_opcheck(shape: str, layout: str, operands: tuple[str, ...]) -> None:
    args = arguments(Case(shape=shape, layout=layout, operands=operands, chunked=True))
    x, groups, weight, bias, eps, channel_bias, scale, shift, activation = args.values()
    mean, rstd = group_statistics(x, groups, eps, channel_bias)
    small = (weight, bias, channel_bias, scale, shift)
    needs = (True, *(operand is not None for operand in small))
    torch.library.opcheck(
        torch.ops.fastdiff.group_norm_silu_backward.default,
        (torch.ones_like(x), x, mean, rstd, groups, *small, activation, *needs),
    )
    for tensor in (x, *small):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, tuple(args.values()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_once_for_every_batch(layout: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    norm = fastdiff.nn.GroupNormSiLU(4, 8)

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def f(x: Tensor, time: Tensor) -> Tensor:
        return norm(x * 1, channel_bias=time) + 1

    for batch in (5, 4, 7):
        x = torch.randn(batch, 8, 6, 6).contiguous(memory_format=LAYOUTS[layout])
        time = torch.randn(batch, 8)
        assert torch.equal(f(x, time), norm(x, channel_bias=time) + 1)
    assert len(graphs) == 1, f"{len(graphs)} graphs: something recompiled"


def test_compiles_with_inductor_and_gradients() -> None:
    torch._dynamo.reset()
    x, scale = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(2, 8, requires_grad=True)

    def loss(x: Tensor, scale: Tensor) -> Tensor:
        return ops.group_norm_silu(x * 2, 4, None, None, scale=scale).square().sum()

    eager = torch.autograd.grad(loss(x, scale), (x, scale))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, scale), (x, scale))
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("dtype", FLOATS)
def test_autocast_casts_nothing(dtype: str) -> None:
    args = arguments(Case(shape="odd", dtype=dtype, operand_dtype="bf16"))
    given = dict(args, activation="silu")
    plain = ops.group_norm_silu(**given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.group_norm_silu(**given)
    assert cast.dtype == FLOATS[dtype]
    assert torch.equal(cast, plain)


@hypothesis.given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), *(st.integers(1, 5) for _ in range(2))),
    groups=st.integers(1, 3),
    data=st.data(),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_shape_and_strides(shape: tuple[int, ...], groups: int, data: st.DataObject) -> None:
    """Any permutation of dimensions and any step: the result is that of the contiguous copy."""
    shape = (shape[0], shape[1] * groups, *shape[2:])
    order = data.draw(st.permutations(range(4)))
    steps = data.draw(st.lists(st.integers(1, 3), min_size=4, max_size=4))
    stored = [shape[d] * s for d, s in zip(order, steps, strict=True)]
    base = torch.randn(stored, generator=torch.Generator().manual_seed(sum(stored)))
    base = base[tuple(slice(None, None, s) for s in steps)]
    x = base.permute([order.index(d) for d in range(4)])
    y = ops.group_norm_silu(x, groups, None, None)
    dense = ops.group_norm_silu(x.contiguous(), groups, None, None)
    # Another memory format adds up in another order; h_hat is below sqrt(numel) <= 18.
    torch.testing.assert_close(y, dense, rtol=0, atol=64 * 2.0**-24 * 18)


@pytest.mark.slow
@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_elements(layout: str) -> None:
    """bfloat16, 2^31 + 2^16 elements: 9 GB for x and y. The last sample is right on its own."""
    shape = (32769, 4, 128, 128)
    x = torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=LAYOUTS[layout])
    x.fill_(1.0)
    x[-1] = torch.randn(shape[1:], generator=torch.Generator().manual_seed(0)).bfloat16()
    y = ops.group_norm_silu(x, 2, None, None)
    assert torch.equal(y[-1:], ops.group_norm_silu(x[-1:], 2, None, None))
    assert not y[-2].any()
    assert y[-1].any()
