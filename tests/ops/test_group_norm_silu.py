"""group_norm_silu: every implementation against float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from op_harness import assert_close, evaluate, implementation_params
from op_harness.group_norm_silu import (
    CASES,
    GRADIENT_CASES,
    OPERANDS,
    Case,
    Exact,
    arguments,
    grad_output,
    operations,
)

from fastdiff.reference.layout import memory_format_of

# Implementations join here once they exist.
IMPLEMENTATIONS = ("reference", "cpu", "cuda-ptx")
FLOAT64 = ("reference", "cpu")


@pytest.mark.parametrize("implementation", implementation_params(*IMPLEMENTATIONS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, implementation: str) -> None:
    if case.dtype == "fp64" and implementation not in FLOAT64:
        pytest.skip("float64 kernels exist on the CPU only")
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


@pytest.mark.parametrize("implementation", implementation_params(*IMPLEMENTATIONS))
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients(case: Case, implementation: str) -> None:
    if case.dtype == "fp64" and implementation not in FLOAT64:
        pytest.skip("float64 kernels exist on the CPU only")
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
