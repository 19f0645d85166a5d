"""posterior_mean: the kernels of q_sample with the posterior's tables, against float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from op_harness import assert_close, available, evaluate, implementation_params
from op_harness.inputs import SHAPES, arrange
from torch import Tensor

import fastdiff
from fastdiff import ops

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULE = fastdiff.NoiseSchedule.linear(1000)
TABLES = SCHEDULE.tables("cpu")
COEFFICIENTS = TABLES.posterior_coef_x0, TABLES.posterior_coef_x_t


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(shape, generator=generator) * 2 - 1
    x_t = torch.randn(shape, generator=generator)
    t = torch.tensor([0, 999, 500])[torch.arange(shape[0]) % 3]
    return arrange(x0.to(dtype), layout), arrange(x_t.to(dtype), layout), t


def terms(x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Both summands in float64, from the schedule's own float64 coefficients."""
    shape = (-1, *[1] * (x0.dim() - 1))
    a, b = SCHEDULE.posterior_mean_coef_x0[t], SCHEDULE.posterior_mean_coef_x_t[t]
    return a.view(shape) * x0.double(), b.view(shape) * x_t.double()


@pytest.mark.parametrize("implementation", implementation_params())
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", ["vectors", "odd", "batch 0"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_kernels(dtype: str, shape: str, layout: str, implementation: str) -> None:
    x0, x_t, t = inputs(SHAPES[shape], FLOATS[dtype], layout)
    arguments = {
        "x0": x0,
        "t": t,
        "coef_x0": COEFFICIENTS[0],
        "coef_x_t": COEFFICIENTS[1],
        "x_t": x_t,
        "keys": None,
        "seed": None,
        "stream": 0,
        "flip": None,
        "dtype": x_t.dtype,
    }
    gradients = ("x0", "x_t")
    grad = torch.ones(x_t.shape, dtype=x_t.dtype)
    result = evaluate("q_sample", implementation, arguments, gradients=gradients, grad_output=grad)
    of_x0, of_x_t = terms(x0, x_t, t)
    assert_close(
        result.outputs[0],
        of_x0 + of_x_t,
        magnitude=of_x0.abs() + of_x_t.abs(),
        operations=5,
        implementation=implementation,
    )
    for name, slope in zip(gradients, terms(grad, grad, t), strict=True):
        assert_close(
            result.gradients[name],
            slope,
            magnitude=slope.abs(),
            operations=2,
            implementation=implementation,
        )


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize("dtypes", [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")])
def test_mixed_dtypes_give_that_of_x_t(dtypes: tuple[str, str], backend: str) -> None:
    x0, x_t, t = inputs(SHAPES["odd"], torch.float32, "contiguous")
    x0, x_t = x0.to(FLOATS[dtypes[0]]), x_t.to(FLOATS[dtypes[1]])
    with fastdiff.use_backend("reference") if backend == "reference" else nullcontext():
        mean = ops.posterior_mean(x0, x_t, t, *COEFFICIENTS)
    assert mean.dtype == x_t.dtype
    of_x0, of_x_t = terms(x0, x_t, t)
    assert_close(mean, of_x0 + of_x_t, magnitude=of_x0.abs() + of_x_t.abs(), operations=5)


def test_levels_are_pixels() -> None:
    x0 = torch.arange(12, dtype=torch.uint8).view(2, 6) * 21
    x_t, t = torch.randn(2, 6), torch.tensor([3, 700])
    pixels = (2 * x0.double() - 255) / 255
    of_x0, of_x_t = terms(pixels, x_t, t)
    mean = ops.posterior_mean(x0, x_t, t, *COEFFICIENTS)
    assert_close(mean, of_x0 + of_x_t, magnitude=of_x0.abs() + of_x_t.abs(), operations=8)


def test_differentiable_twice() -> None:
    x0, x_t, t = inputs(SHAPES["odd"], torch.float64, "contiguous")

    def f(x0: Tensor, x_t: Tensor) -> Tensor:
        return ops.posterior_mean(x0, x_t, t, *COEFFICIENTS)

    arguments = (x0.requires_grad_(), x_t.requires_grad_())
    assert torch.autograd.gradcheck(f, arguments)
    assert torch.autograd.gradgradcheck(f, arguments)


def test_compiles_once_for_every_batch() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def f(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return ops.posterior_mean(x0 * 1, x_t, t, *COEFFICIENTS)

    for batch in (5, 4, 7):
        args = inputs((batch, 3, 6, 6), torch.float32, "contiguous")
        assert torch.equal(f(*args), ops.posterior_mean(*args, *COEFFICIENTS))
    assert len(graphs) == 1, f"{len(graphs)} graphs: something recompiled"


def test_mean_variance_are_the_posteriors() -> None:
    x0, x_t, t = inputs(SHAPES["odd"], torch.bfloat16, "channels_last")
    tables = (TABLES.posterior_variance, TABLES.posterior_log_variance_clipped)
    mean, variance, log_variance = ops.posterior_mean_variance(x0, x_t, t, *COEFFICIENTS, *tables)
    assert torch.equal(mean, ops.posterior_mean(x0, x_t, t, *COEFFICIENTS))
    for value, table in ((variance, tables[0]), (log_variance, tables[1])):
        assert value.dtype == torch.float32
        assert torch.equal(value, table[t].view(-1, 1, 1, 1).expand(x_t.shape))


BAD_INPUT = [
    ({"x0": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x0 has dtype torch.int32"),
    ({"x_t": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "x_t has dtype torch.uint8"),
    ({"x_t": torch.zeros(2, 4)}, ValueError, r"x_t has shape \(2, 4\), expected \(2, 3\) as x0"),
    ({"x0": torch.tensor(1.0)}, ValueError, r"x0 has shape \(\)"),
    ({"x0": torch.zeros(2, 3, device="meta")}, ValueError, "x_t is on cpu, expected meta"),
    ({"t": torch.tensor([1, 2, 3])}, ValueError, r"t has shape \(3,\), expected \(2,\)"),
    ({"t": torch.tensor([1.0, 2.0])}, TypeError, "t has dtype torch.float32"),
    ({"t": torch.tensor([1, 1000])}, IndexError, "expected 0 <= t < 1000"),
    ({"coef_x0": torch.zeros(9)}, ValueError, "coef_x_t has 1000 entries, expected 9"),
    ({"coef_x0": torch.zeros(1000).half()}, TypeError, "coef_x0 has dtype torch.float16"),
]


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type, message: str, backend: str) -> None:
    good = {
        "x0": torch.zeros(2, 3),
        "x_t": torch.zeros(2, 3),
        "t": torch.tensor([1, 2]),
        "coef_x0": COEFFICIENTS[0],
        "coef_x_t": COEFFICIENTS[1],
    }
    chosen = fastdiff.use_backend("reference") if backend == "reference" else nullcontext()
    with chosen, pytest.raises(error, match=message):
        ops.posterior_mean(**{**good, **change})


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_no_worse_than_eager(dtype: str) -> None:
    """Millions of elements: one rounding at the end, eager rounds tables, products and sum."""
    x0, x_t, t = inputs((3, 4, 512, 512), FLOATS[dtype], "contiguous")
    exact = sum(terms(x0, x_t, t))
    shape = (-1, 1, 1, 1)
    a, b = (c[t].to(x0.dtype).view(shape) for c in COEFFICIENTS)
    fused, eager = (
        (mean.double() - exact).abs().flatten(1).max(1).values
        for mean in (ops.posterior_mean(x0, x_t, t, *COEFFICIENTS), a * x0 + b * x_t)
    )
    print(f"{dtype}: largest error fused {fused.tolist()}, eager {eager.tolist()}")
    assert bool((fused <= eager).all())
