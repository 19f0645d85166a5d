"""vlb_terms as an operator: gradients, compilation, strides, determinism, bad input."""

from __future__ import annotations

import math
from contextlib import nullcontext

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from op_harness import available
from op_harness.inputs import arrange
from op_harness.vlb_terms_cases import TABLES, Case, arguments, double_arguments
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops.vlb_terms import Arguments, _reference
from fastdiff.reference.step_columns import PREDICTIONS


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_whatever_the_threads(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, x_t = (arrange(torch.randn(3, 5, 70, 70, generator=generator), layout) for _ in range(2))
    output = arrange(torch.randn(3, 10, 70, 70, generator=generator), layout).requires_grad_()
    t, table = torch.tensor([0, 5, 900]), TABLES["learned_range"]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            terms = ops.vlb_terms(x0, x_t, output, t, table, seed=0, variance="learned_range")
            terms = torch.stack(terms)
            results.append((terms.detach(), *torch.autograd.grad(terms.sum(), output)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_differentiable_twice(prediction: str, variance: str) -> None:
    case = Case(shape="rows", prediction=prediction, variance=variance, clip=False, t=(0, 30))
    exact = double_arguments(arguments(case))
    names = ("x0", "x_t", "model_output", "noise")
    inputs = tuple(exact[k][:, :2].clone().requires_grad_() for k in names if k != "model_output")
    channels = exact["x_t"].shape[1]
    columns = [0, 1] + ([channels, channels + 1] if exact["learned"] else [])
    output = exact["model_output"][:, columns].clone().requires_grad_()

    def f(x0: Tensor, x_t: Tensor, noise: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        how = {"prediction": prediction, "variance": variance, "clip": False}
        return ops.vlb_terms(x0, x_t, output, exact["t"], exact["table"], noise=noise, **how)

    assert torch.autograd.gradcheck(f, (*inputs, output))
    assert torch.autograd.gradgradcheck(f, (*inputs, output))


def test_second_derivative_of_the_kernels() -> None:
    """create_graph: the gradient of a gradient, in float32, is the reference's."""
    args = arguments(Case(shape="odd", clip=False))
    found = []
    for raw in (True, False):
        args["model_output"] = args["model_output"].detach().requires_grad_()
        a = Arguments(**args)
        terms = torch.ops.fastdiff.vlb_terms(*a) if raw else _reference(a)
        (g,) = torch.autograd.grad(terms.sum(), args["model_output"], create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), args["model_output"])[0])
    torch.testing.assert_close(found[0], found[1])


def test_detached_mean_trains_the_variance_alone() -> None:
    """IDDPM's hybrid loss: values and variance gradients as without, no gradient of the mean."""
    args = arguments(Case(shape="odd"))
    results = []
    for detach in (False, True):
        args |= {
            "detach_mean": detach,
            "model_output": args["model_output"].detach().requires_grad_(),
        }
        terms = torch.ops.fastdiff.vlb_terms(*args.values())
        results.append((terms, *torch.autograd.grad(terms.sum(), args["model_output"])))
    (plain, plain_gradient), (detached, gradient) = results
    assert torch.equal(plain, detached)
    assert not gradient[:, :3].any()
    assert bool(plain_gradient[:, :3].any())
    assert torch.equal(gradient[:, 3:], plain_gradient[:, 3:])


def test_gradients_of_the_data_run_on_the_reference() -> None:
    args = arguments(Case(shape="odd", clip=False))
    how = {"noise": args["noise"], "variance": "learned_range", "clip": False}
    x0 = args["x0"].requires_grad_()
    inputs = (x0, args["x_t"], args["model_output"], args["t"], args["table"])
    kl = ops.vlb_terms(*inputs, **how)[0]
    (gradient,) = torch.autograd.grad(kl.sum(), x0)
    assert bool(gradient.any())
    if available("cpu") is None:
        with fastdiff.use_backend("cpu"), pytest.raises(RuntimeError, match="model_output alone"):
            ops.vlb_terms(*inputs, **how)


@pytest.mark.parametrize("mode", ["given", "seed", "keys"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, mode: str) -> None:
    args = arguments(Case(shape="odd", layout=layout, mode=mode))
    grad = torch.ones(3, len(args["x_t"]))
    torch.library.opcheck(torch.ops.fastdiff.vlb_terms_backward.default, (grad, *args.values()))
    args["model_output"].requires_grad_()
    torch.library.opcheck(torch.ops.fastdiff.vlb_terms.default, tuple(args.values()))


def test_compiles_once_for_every_batch_seed_and_stream() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def terms(x: Tensor, t: Tensor, seed: int, stream: int) -> Tensor:
        how = {"seed": seed, "stream": stream}
        return sum(ops.vlb_terms(x, x, x * 2, t, TABLES["fixed_large"], **how))

    f = torch.compile(terms, fullgraph=True, dynamic=True, backend=backend)
    for batch, seed, stream in ((5, 11, 2), (4, 12, 3), (7, 10**12, 2**40)):
        x, t = torch.randn(batch, 3, 6, 6), torch.arange(batch)
        assert torch.equal(f(x, t, seed, stream), terms(x, t, seed, stream))
    assert len(graphs) == 1, f"{len(graphs)} graphs: something recompiled"


def test_compiles_with_inductor_and_gradients() -> None:
    torch._dynamo.reset()
    x, t = torch.randn(3, 3, 6, 6), torch.tensor([0, 3, 900])
    output = torch.randn(3, 6, 6, 6, requires_grad=True)

    def loss(output: Tensor) -> Tensor:
        how = {"seed": 4, "variance": "learned_range", "clip": False}
        kl, _, eps_mse = ops.vlb_terms(x, x, output * 2, t, TABLES["learned_range"], **how)
        return kl.sum() + eps_mse.sum()

    (eager,) = torch.autograd.grad(loss(output), output)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(output), output)
    torch.testing.assert_close(compiled, eager)


def test_autocast_casts_nothing() -> None:
    args = arguments(Case())
    inputs = [args[k] for k in ("x0", "x_t", "model_output", "t", "table")]
    how = {"noise": args["noise"], "variance": "learned_range"}
    plain = torch.stack(ops.vlb_terms(*inputs, **how))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.stack(ops.vlb_terms(*inputs, **how)), plain)


@hypothesis.given(shape=st.lists(st.integers(0, 7), min_size=2, max_size=5), data=st.data())
@hypothesis.settings(max_examples=30, deadline=None)
def test_any_shape_and_strides(shape: list[int], data: st.DataObject) -> None:
    """Any permutation of dimensions and any step: the result is that of the contiguous copy."""
    order = data.draw(st.permutations(range(len(shape))))
    steps = data.draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    stored = [shape[d] * s for d, s in zip(order, steps, strict=True)]
    base = torch.randn(stored, generator=torch.Generator().manual_seed(sum(stored)))
    base = base[tuple(slice(None, None, s) for s in steps)]
    x = base.permute([order.index(d) for d in range(len(shape))])
    output = torch.cat([x.flip(1), x], 1)
    t = torch.arange(shape[0])
    found, dense = (
        torch.stack(
            ops.vlb_terms(*inputs, t, TABLES["learned"], seed=3, variance="learned", clip=False)
        )
        for inputs in ((x, x, output), [y.contiguous() for y in (x, x, output)])
    )
    # Another memory format adds up in another order; the terms of these sums are not negative.
    relative = 2 * (64 + math.prod(shape[1:])) * 2.0**-24
    torch.testing.assert_close(found, dense, rtol=relative, atol=1e-6, equal_nan=True)


def good_arguments() -> dict:
    x = torch.zeros(2, 3, 4, 4)
    return {
        "x0": x,
        "x_t": x,
        "model_output": x,
        "t": torch.tensor([0, 5]),
        "table": TABLES["fixed_large"],
        "noise": x,
    }


_X = torch.zeros(2, 3, 4, 4)
BAD_INPUT = [
    ({"x_t": _X.int()}, TypeError, "x_t has dtype torch.int32"),
    ({"x0": _X.byte()}, TypeError, "x0 has dtype torch.uint8"),
    ({"x_t": torch.zeros(2)}, ValueError, r"x_t has shape \(2,\), expected \(B, C, ...\)"),
    ({"x0": _X[:1]}, ValueError, r"x0 has shape \(1, 3, 4, 4\), expected \(2, 3, 4, 4\)"),
    ({"model_output": _X[:, :2]}, ValueError, "without variance channels"),
    ({"model_output": torch.cat([_X, _X], 1)}, ValueError, "without variance channels"),
    ({"variance": "learned"}, ValueError, r"expected \(2, 6, 4, 4\), with variance channels"),
    ({"model_output": _X.long()}, TypeError, "model_output has dtype torch.int64"),
    ({"model_output": _X.to("meta")}, ValueError, "model_output is on meta"),
    ({"noise": None}, ValueError, "pass either noise or seed; neither was given"),
    ({"seed": 3}, ValueError, "pass either noise or seed; both was given"),
    ({"noise": _X[:, :2]}, ValueError, "noise has shape"),
    ({"noise": None, "seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed has shape"),
    ({"t": torch.tensor([0, 5]).int()}, TypeError, "t has dtype torch.int32"),
    ({"t": torch.tensor([0])}, ValueError, "t has shape"),
    ({"t": torch.tensor([0, 1000])}, IndexError, "expected 0 <= t < 1000"),
    ({"t": torch.tensor([-1, 0])}, IndexError, "expected 0 <= t < 1000"),
    ({"table": TABLES["learned"][:, :8]}, ValueError, "table has shape"),
    ({"table": TABLES["learned"].half()}, TypeError, "table has dtype torch.float16"),
    ({"table": TABLES["learned"].to("meta")}, ValueError, "table is on meta"),
    ({"prediction": "score"}, ValueError, "unknown prediction 'score'; choose from eps, x0"),
    ({"variance": "fixed"}, ValueError, "unknown variance 'fixed'; choose from fixed_large"),
    ({"stream": 1.0}, TypeError, "stream is 1.0, expected an int"),
]


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type, message: str, backend: str) -> None:
    chosen = fastdiff.use_backend("reference") if backend == "reference" else nullcontext()
    with chosen, pytest.raises(error, match=message):
        ops.vlb_terms(**{**good_arguments(), **change})


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_raw_operator_refuses_bad_input(change: dict, error: type, message: str) -> None:
    """The bindings alone keep the kernels memory-safe: raw operators skip the Python checks."""
    args = {
        **good_arguments(),
        "keys": None,
        "seed": None,
        "stream": 0,
        "prediction": 0,
        "learned": False,
        "clip": True,
        "detach_mean": False,
    }
    change = dict(change)
    if change.get("prediction"):
        change["prediction"] = 4
    if (variance := change.pop("variance", None)) is not None:
        change = {"learned": True} if variance == "learned" else {"prediction": -1}
    args.update(change)
    if isinstance(args["seed"], Tensor):
        args["seed"], args["keys"] = None, args["seed"]
    refused = (RuntimeError, NotImplementedError, TypeError)
    with pytest.raises(refused):
        torch.ops.fastdiff.vlb_terms.default(*args.values())
    with pytest.raises(refused):
        torch.ops.fastdiff.vlb_terms_backward.default(torch.ones(3, 2), *args.values())


@pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")
@pytest.mark.parametrize("grad", [torch.ones(3), torch.ones(3, 1), torch.ones(3, 2).half()])
def test_raw_backward_refuses_bad_gradients(grad: Tensor) -> None:
    args = (*good_arguments().values(), None, None, 0, 0, False, True, False)
    with pytest.raises(RuntimeError):
        torch.ops.fastdiff.vlb_terms_backward(grad, *args)
