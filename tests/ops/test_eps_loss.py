"""eps_loss: every implementation against float64, forward and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from op_harness import ON_GPU, assert_close, case_params, evaluate, implementation_params
from op_harness.inputs import SHAPES, arrange
from ptx_emulator.counters import Requests
from torch import Tensor

import fastdiff
from fastdiff import ops, reference
from fastdiff.reference.eps_loss import LOSS_KINDS, REDUCTIONS, loss_terms

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    shape: str = "vectors"
    layout: str = "contiguous"
    dtype: str = "fp32"
    mode: str = "given"
    noise: str | None = None  # dtype, default that of the prediction
    reduction: str = "none"
    kind: str = "mse"
    weighted: bool = True

    def __str__(self) -> str:
        parts = [self.shape, self.layout, self.dtype, self.mode, self.reduction, self.kind]
        parts += [f"noise {self.noise}"] if self.noise else []
        parts += [] if self.weighted else ["unweighted"]
        return ", ".join(parts)


CASES = [
    *(Case(dtype=dtype, mode=mode) for dtype in FLOATS for mode in ("given", "seed")),
    *(
        Case(layout="channels_last", dtype=dtype, mode=mode, reduction="mean")
        for dtype in FLOATS
        for mode in ("given", "seed")
    ),
    *(
        Case(shape="odd", reduction=reduction, kind=kind, weighted=weighted, dtype="bf16")
        for reduction, kind, weighted in (
            ("none", "l1", True),
            ("none", "huber", False),
            ("mean", "huber", True),
            ("sum", "mse", True),
            ("sum", "l1", False),
        )
    ),
    *(
        Case(shape=shape, mode=mode, reduction=reduction)
        for shape in SHAPES
        if shape != "vectors"
        for mode, reduction in (("given", "mean"), ("seed", "none"))
    ),
    Case(shape="batch 0", reduction="sum"),
    *(
        Case(shape=shape, mode="seed", layout="channels_last", dtype=dtype)
        for shape in ("odd", "many channels", "volume", "several chunks")
        for dtype in ("fp32", "bf16")
    ),
    *(
        Case(layout=layout, dtype=dtype, mode=mode)
        for layout in ("sliced", "sliced channels_last", "expanded", "misaligned")
        for dtype, mode in (("fp32", "given"), ("bf16", "seed"))
    ),
    Case(dtype="fp16", mode="keys"),
    Case(dtype="bf16", noise="fp32"),
    Case(dtype="fp32", noise="bf16"),
    Case(dtype="fp16", noise="bf16"),
]


def arguments(case: Case) -> dict:
    """The raw operator's arguments."""
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES[case.shape]
    batch = shape[0]
    dtype = FLOATS[case.dtype]
    noise = torch.randn(shape, generator=generator).to(FLOATS[case.noise or case.dtype])
    return {
        "prediction": arrange(torch.randn(shape, generator=generator).to(dtype), case.layout),
        "noise": arrange(noise, case.layout) if case.mode == "given" else None,
        "keys": reference.sample_keys(-7, batch) if case.mode == "keys" else None,
        "seed": 2**63 - 5 if case.mode == "seed" else None,
        "stream": 2**40 + 3,
        "weight": torch.rand(batch, generator=generator) + 0.5 if case.weighted else None,
        "reduction": REDUCTIONS.index(case.reduction),
        "kind": LOSS_KINDS.index(case.kind),
    }


def double_inputs(args: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, noise and weight in float64, contiguous."""
    prediction, keys = args["prediction"], args["keys"]
    if args["seed"] is not None:
        keys = reference.sample_keys(args["seed"], len(prediction))
    noise = args["noise"]
    if keys is not None:
        noise = reference.normals(keys, prediction.shape, args["stream"], torch.float64)
    weight = torch.ones(len(prediction)) if args["weight"] is None else args["weight"]
    return prediction.double().contiguous(), noise.double(), weight.double()


def expected(args: dict) -> tuple[Tensor, Tensor]:
    """The float64 result, and the magnitude of the terms that were added up."""
    p, n, w = double_inputs(args)
    kind, reduction = LOSS_KINDS[args["kind"]], REDUCTIONS[args["reduction"]]
    w = w.reshape(-1, *[1] * (p.dim() - 1))
    terms = w * loss_terms(p - n, kind)
    # An error e of d changes the loss by at most slope e, and |slope| |d| <= |p| + |n| bounds it
    # for every kind up to the factor 2 (|p| + |n|) that only the square has.
    size = p.abs() + n.abs()
    magnitude = w * (size.square() if kind == "mse" else size + 1)
    axes = tuple(range(1, p.dim()))
    if reduction == "none":
        return terms.mean(axes), magnitude.mean(axes)
    if reduction == "mean":
        return terms.mean(), magnitude.mean()
    return terms.sum(), magnitude.sum()


def operations(args: dict) -> int:
    """Roundings of one loss: the error (twice: squared), three in its term, weight and scale, one
    per level of the sums, and eight for a normal (four ulps), twice.

    Levels: a chain over the elements of one thread and over a lane's chunks (at most as long as
    the tile of 1024 / 16 vector lanes here), and trees of at most 10 levels, twice.
    """
    chain = 64 + args["prediction"].shape[0]
    return 2 + 3 + 3 + chain + 20 + 16


@pytest.mark.parametrize(("case", "implementation"), case_params(CASES, "dtype", "layout"))
def test_forward(case: Case, implementation: str) -> None:
    args = arguments(case)
    (loss,) = evaluate("eps_loss", implementation, args).outputs
    value, magnitude = expected(args)
    assert loss.dtype == torch.float32
    if case.shape == "batch 0" and case.reduction == "mean":
        assert loss.isnan()  # as torch.nn.functional.mse_loss
        return
    assert_close(loss, value, magnitude=magnitude, operations=operations(args))


GRADIENT_CASES = [
    *(Case(shape="odd", dtype=dtype, reduction="mean") for dtype in FLOATS),
    Case(shape="odd", layout="channels_last", dtype="bf16", reduction="mean"),
    *(Case(dtype=dtype, mode="seed", reduction="none") for dtype in FLOATS),
    Case(shape="odd", mode="seed", layout="channels_last", reduction="sum"),
    Case(layout="channels_last", mode="seed", dtype="bf16", reduction="mean", weighted=False),
    Case(reduction="sum", kind="l1"),
    Case(dtype="fp16", reduction="none", kind="huber"),
    Case(dtype="bf16", noise="fp32", reduction="mean"),
    Case(dtype="fp16", noise="bf16", reduction="mean"),
    Case(layout="sliced", dtype="bf16"),
    Case(shape="batch 0"),
]


@pytest.mark.parametrize(("case", "implementation"), case_params(GRADIENT_CASES, "dtype", "layout"))
def test_gradients(case: Case, implementation: str) -> None:
    args = arguments(case)
    names = ("prediction", *(["noise"] if case.mode == "given" else []))
    names += ("weight",) if case.weighted else ()
    batch = len(args["prediction"])
    grad = torch.linspace(0.5, 1.5, batch) if case.reduction == "none" else torch.tensor(-1.25)
    result = evaluate("eps_loss", implementation, args, gradients=names, grad_output=grad)
    p, n, w = double_inputs(args)
    terms = {"prediction": p, "noise": n, "weight": w}
    for x in terms.values():
        x.requires_grad_()
    per_element = w.reshape(-1, *[1] * (p.dim() - 1)) * loss_terms(p - n, case.kind)
    samples = per_element.flatten(1)
    samples = samples.sum(1) if case.reduction == "sum" else samples.mean(1)
    loss = {"none": samples, "mean": samples.mean(), "sum": samples.sum()}[case.reduction]
    wanted = torch.autograd.grad(loss, [terms[name] for name in names], grad.double())
    for name, value in zip(names, wanted, strict=True):
        actual = result.gradients[name]
        if name == "weight":
            magnitude = value.abs() * 2 + 2 * grad.abs()
            assert_close(actual, value, magnitude=magnitude, operations=operations(args))
            continue
        assert actual.dtype == args[name].dtype
        # factor (scale, grad, weight: 5 roundings) times slope(d), d of magnitude |p| + |n|. At a
        # kink a rounded d may fall on the other side, but not so far that it matters here.
        factor = (value / torch.where(p == n, 1, p - n)).abs()
        magnitude = factor * (p.abs() + n.abs())
        assert_close(
            actual,
            value,
            magnitude=magnitude.detach(),
            operations=6 + (8 if case.mode != "given" else 0),
            implementation=implementation,
        )


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["given", "seed"])
def test_traffic(mode: str, dtype: str, layout: str, arch: str, implementation: str) -> None:
    """Forward: each input once. Backward: each input once, each gradient once, in one launch."""
    case = Case(shape="several chunks", layout=layout, dtype=dtype, mode=mode, reduction="mean")
    args = arguments(case)
    result = evaluate(
        "eps_loss",
        implementation,
        args,
        gradients=("prediction",),
        grad_output=torch.tensor(1.0),
        arch=arch,
        count=True,
    )
    size = args["prediction"].numel() * args["prediction"].element_size()
    first, finish, backward = result.launches
    inputs = 2 if mode == "given" else 1
    for launch, tensors in ((first, inputs), (backward, inputs + 1)):
        large = [array for array in launch.counters.arrays if array.size >= size]
        assert len(large) == tensors
        moved = sum(array.loaded_bytes + array.stored_bytes for array in large)
        small = [array for array in launch.counters.arrays if array.size < size]
        if launch is first:
            small += finish.counters.arrays
        moved += sum(array.unique_loaded_bytes + array.stored_bytes for array in small)
        assert moved <= 1.05 * tensors * size
        requests = sum((a.load_requests + a.store_requests for a in large), Requests())
        assert set(requests.widths) == {16}
        assert requests.sectors <= 1.05 * requests.min_sectors


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize("mode", ["given", "seed"])
def test_traffic_of_samples_of_one_block(mode: str, arch: str, implementation: str) -> None:
    """The 8x8 digits: no second launch for losses, few partial sums for their mean."""
    generator = torch.Generator().manual_seed(3)
    args = arguments(Case(shape="rows", mode=mode, weighted=False))
    args["prediction"] = prediction = torch.randn((64, 1, 8, 8), generator=generator).bfloat16()
    noise = torch.randn(prediction.shape, generator=generator).bfloat16()
    args |= {"noise": noise if mode == "given" else None, "weight": torch.rand(64) + 0.5}
    result = evaluate("eps_loss", implementation, args, arch=arch, count=True)
    (launch,) = result.launches
    arrays = launch.counters.arrays
    moved = sum(array.unique_loaded_bytes + array.stored_bytes for array in arrays)
    images = prediction.nbytes * (2 if mode == "given" else 1)
    assert moved <= 1.05 * (images + 2 * 64 * 4)  # and weights and losses
    value, magnitude = expected(args)
    assert_close(result.outputs[0], value, magnitude=magnitude, operations=operations(args))
    args["reduction"] = REDUCTIONS.index("mean")
    mean = evaluate("eps_loss", implementation, args, arch=arch, count=True)
    assert [math.prod(launch.grid) for launch in mean.launches] == [16, 1]
    moved = sum(
        array.unique_loaded_bytes + array.stored_bytes
        for launch in mean.launches
        for array in launch.counters.arrays
    )
    assert moved <= 1.05 * (images + 64 * 4 + 4)
    value, magnitude = expected(args)
    assert_close(mean.outputs[0], value, magnitude=magnitude, operations=operations(args))


@pytest.mark.parametrize(
    "implementation",
    implementation_params("triton-interpreted", "triton-ptx", "cuda-ptx", *ON_GPU),
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mode", "weighted"), [("given", False), ("seed", True)])
def test_sum_of_small_samples(mode: str, weighted: bool, layout: str, implementation: str) -> None:
    """A block adds up four of eleven samples, the last one three."""
    args = arguments(Case(shape="rows", mode=mode, reduction="sum", kind="huber"))
    generator = torch.Generator().manual_seed(4)
    prediction, noise = torch.randn((2, 11, 3, 4, 4), generator=generator).bfloat16()
    args |= {"prediction": arrange(prediction, layout)}
    args |= {"noise": arrange(noise, layout) if mode == "given" else None}
    args |= {"weight": torch.rand(11, generator=generator) + 0.5 if weighted else None}
    result = evaluate("eps_loss", implementation, args)
    if implementation.endswith("-ptx"):
        assert [math.prod(launch.grid) for launch in result.launches] == [3, 1]
    value, magnitude = expected(args)
    assert_close(result.outputs[0], value, magnitude=magnitude, operations=operations(args))


@pytest.mark.parametrize("implementation", implementation_params("cpu", "cuda-ptx", *ON_GPU))
@pytest.mark.parametrize("mode", ["given", "seed"])
def test_a_sample_does_not_depend_on_its_batch(mode: str, implementation: str) -> None:
    args = arguments(Case(shape="vectors", mode="given" if mode == "given" else "keys"))
    (both,) = evaluate("eps_loss", implementation, args).outputs
    alone = {k: v[1:] if isinstance(v, Tensor) else v for k, v in args.items()}
    (one,) = evaluate("eps_loss", implementation, alone).outputs
    assert torch.equal(one, both[1:])


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx", *ON_GPU))
def test_samples_of_many_chunks(implementation: str) -> None:
    """Above 1024 blocks of 512 elements a sample, each program sums more than one of them."""
    args = arguments(Case(shape="rows", weighted=False))
    generator = torch.Generator().manual_seed(2)
    prediction, noise = (torch.randn((1, 1030 * 512 + 4), generator=generator) for _ in range(2))
    args |= {"prediction": prediction, "noise": noise}
    result = evaluate("eps_loss", implementation, args, racecheck=False)
    if implementation.endswith("-ptx"):
        assert 132 <= math.prod(result.launches[0].grid) <= 1024
    value, magnitude = expected(args)
    assert_close(result.outputs[0], value, magnitude=magnitude, operations=operations(args))


def test_millions_of_half_precision_elements() -> None:
    """A bf16 or fp16 accumulator would stop at 256 or 2048; eager sums in float32 too."""
    generator = torch.Generator().manual_seed(1)
    prediction = torch.randn((1, 4, 1024, 1024), generator=generator)
    noise = torch.randn((1, 4, 1024, 1024), generator=generator)
    for dtype in (torch.bfloat16, torch.float16):
        p, n = prediction.to(dtype), noise.to(dtype)
        exact = (p.double() - n.double()).square().mean().item()
        fused = abs(ops.eps_loss(p, n).item() - exact)
        eager = abs(torch.nn.functional.mse_loss(p, n).item() - exact)
        print(f"{dtype}: error fused {fused:.3g}, eager {eager:.3g}, loss {exact:.6g}")
        assert fused <= max(eager, 2**-22 * exact)
        assert fused <= 30 * 2**-24 * exact


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_whatever_the_threads(layout: str) -> None:
    prediction = arrange(torch.randn(3, 5, 70, 70), layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.eps_loss(prediction, seed=0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_differentiable_twice(reduction: str, kind: str) -> None:
    args = arguments(Case(shape="rows"))
    inputs = tuple(args[k].double().requires_grad_() for k in ("prediction", "noise", "weight"))

    def f(prediction: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        return ops.eps_loss(prediction, noise, weight=weight, reduction=reduction, kind=kind)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("mode", ["given", "seed", "keys"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, mode: str) -> None:
    args = arguments(Case(shape="odd", layout=layout, mode=mode))
    grad = torch.ones(len(args["prediction"]))
    backward = (grad, *args.values(), True, mode == "given")
    torch.library.opcheck(torch.ops.fastdiff.eps_loss_backward.default, backward)
    args["prediction"].requires_grad_()
    torch.library.opcheck(torch.ops.fastdiff.eps_loss.default, tuple(args.values()))


def test_compiles_once_for_every_batch_seed_and_stream() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def f(prediction: Tensor, seed: int, stream: int) -> Tensor:
        return ops.eps_loss(prediction * 1, seed=seed, stream=stream, reduction="none") + 1

    for batch, seed, stream in ((5, 11, 2), (4, 12, 3), (7, 10**12, 2**40)):
        prediction = torch.randn(batch, 3, 6, 6)
        eager = ops.eps_loss(prediction, seed=seed, stream=stream, reduction="none") + 1
        assert torch.equal(f(prediction, seed, stream), eager)
    assert len(graphs) == 1, f"{len(graphs)} graphs: something recompiled"


def test_compiles_with_inductor_and_gradients() -> None:
    torch._dynamo.reset()
    prediction = torch.randn(3, 3, 6, 6, requires_grad=True)

    def loss(prediction: Tensor) -> Tensor:
        return ops.eps_loss(prediction * 2, seed=4)

    (eager,) = torch.autograd.grad(loss(prediction), prediction)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(prediction), prediction)
    torch.testing.assert_close(compiled, eager)


def test_regenerated_noise_trains_like_stored_noise() -> None:
    """q_sample -> model -> eps_loss in bfloat16: the same gradients, bit for bit."""
    schedule = fastdiff.NoiseSchedule.linear(1000)
    tables = schedule.sqrt_alpha_bars.float(), schedule.sqrt_one_minus_alpha_bars.float()
    x0, t = torch.rand(4, 3, 8, 8).bfloat16(), torch.tensor([0, 10, 500, 999])
    model = torch.nn.Conv2d(3, 3, 3, padding=1).bfloat16()
    gradients = []
    for stored in (True, False):
        noise = ops.philox_normal(x0.shape, seed=3, stream=5) if stored else None
        how = {} if stored else {"seed": 3, "stream": 5}
        x_t = ops.q_sample(x0, t, *tables, noise, **how)
        loss = ops.eps_loss(model(x_t), noise, **how)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for with_stored, with_regenerated in zip(*gradients, strict=True):
        assert torch.equal(with_stored, with_regenerated)


def test_autocast_casts_nothing() -> None:
    args = arguments(Case())
    plain = ops.eps_loss(args["prediction"], args["noise"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.eps_loss(args["prediction"], args["noise"]), plain)


@hypothesis.given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=5), data=st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_shape_and_strides(shape: list[int], data: st.DataObject) -> None:
    """Any permutation of dimensions and any step: the result is that of the contiguous copy."""
    order = data.draw(st.permutations(range(len(shape))))
    steps = data.draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    stored = [shape[d] * s for d, s in zip(order, steps, strict=True)]
    base = torch.randn(stored, generator=torch.Generator().manual_seed(sum(stored)))
    base = base[tuple(slice(None, None, s) for s in steps)]
    prediction = base.permute([order.index(d) for d in range(len(shape))])
    loss = ops.eps_loss(prediction, seed=3, reduction="none")
    dense = ops.eps_loss(prediction.contiguous(), seed=3, reduction="none")
    # Another memory format adds up in another order.
    relative = 2 * unit(64 + math.prod(shape[1:]))
    torch.testing.assert_close(loss, dense, rtol=relative, atol=0, equal_nan=True)


def unit(operations: int) -> float:
    return operations * 2.0**-24
