"""q_sample: every implementation against the float64 reference, forward and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from op_harness import assert_close, available, case_params, evaluate, implementation_params
from op_harness.inputs import SHAPES, T, arrange, tables
from ptx_emulator.counters import Requests
from torch import Tensor

import fastdiff
from fastdiff import ops, reference

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Roundings of a x0 + b noise in float32: the two tables, two products, one sum, and for generated
# noise four ulps of the normal (measured: under two).
OPERATIONS = {"given": 5, "none": 2, "seed": 5 + 8, "keys": 5 + 8}


@dataclass(frozen=True)
class Case:
    shape: str = "vectors"
    layout: str = "contiguous"
    x0: str = "fp32"
    mode: str = "given"
    noise: str | None = None  # dtype, default that of the result
    dtype: str | None = None
    flip: bool = False

    def __str__(self) -> str:
        parts = [self.shape, self.layout, self.x0, self.mode]
        parts += [f"noise {self.noise}"] if self.noise else []
        parts += [f"to {self.dtype}"] if self.dtype else []
        parts += ["flip"] if self.flip else []
        return ", ".join(parts)


CASES = [
    *(Case(x0=x0, mode=mode) for x0 in (*FLOATS, "uint8") for mode in ("given", "seed")),
    *(
        Case(layout="channels_last", x0=x0, mode=mode)
        for x0 in (*FLOATS, "uint8")
        for mode in ("given", "seed")
    ),
    *(Case(shape=shape) for shape in SHAPES if shape != "vectors"),
    *(Case(shape=shape, mode="seed") for shape in SHAPES if shape != "vectors"),
    *(
        Case(shape=shape, mode="seed", layout="channels_last", x0=x0)
        for shape in ("odd", "many channels", "volume", "several chunks")
        for x0 in ("fp32", "bf16")
    ),
    *(
        Case(layout=layout, x0=x0, mode=mode)
        for layout in ("sliced", "sliced channels_last", "expanded", "misaligned")
        for x0, mode in (("fp32", "given"), ("bf16", "seed"))
    ),
    *(Case(x0="bf16", mode=mode) for mode in ("none", "keys")),
    *(Case(x0="bf16", noise="fp32"), Case(x0="fp32", dtype="fp16"), Case(x0="fp16", dtype="fp32")),
    *(
        Case(shape=shape, layout=layout, x0="uint8", mode="seed", dtype="bf16", flip=True)
        for shape in ("vectors", "odd")
        for layout in ("contiguous", "channels_last")
    ),
    Case(shape="rows", flip=True),
]


def arguments(case: Case, seed: int = 0) -> dict:
    """The raw operator's arguments."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES[case.shape]
    if case.x0 == "uint8":
        x0 = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        x0.flatten()[:2] = torch.tensor([0, 255])  # the ends of the range
    else:
        x0 = (torch.rand(shape, generator=generator) * 2 - 1).to(FLOATS[case.x0])
    dtype = FLOATS[case.dtype] if case.dtype else None
    result = dtype or (torch.float32 if case.x0 == "uint8" else x0.dtype)
    noise = torch.randn(shape, generator=generator).to(FLOATS[case.noise] if case.noise else result)
    a, b = tables()
    batch = shape[0]
    return {
        "x0": arrange(x0, case.layout),
        # Both ends of the schedule, where one of the coefficients nearly vanishes.
        "t": torch.tensor([0, T - 1, 500])[torch.arange(batch) % 3],
        "sqrt_alpha_bar": a,
        "sqrt_one_minus_alpha_bar": b,
        "noise": arrange(noise, case.layout) if case.mode == "given" else None,
        "keys": reference.sample_keys(-7, batch) if case.mode == "keys" else None,
        "seed": 2**63 - 5 if case.mode == "seed" else None,
        "stream": 2**40 + 3,
        "flip": (torch.arange(batch) % 2 == 0) if case.flip else None,
        "dtype": dtype,
    }


def expected(args: dict) -> tuple[Tensor, Tensor]:
    """The float64 result, and the sum of its terms' absolute values."""
    a, b, t = args["sqrt_alpha_bar"].double(), args["sqrt_one_minus_alpha_bar"].double(), args["t"]
    x0, noise = args["x0"], args["noise"]
    x = reference.q_sample(x0, t, torch.ones_like(a), b, flip=args["flip"], dtype=torch.float64)
    keys = args["keys"]
    if args["seed"] is not None:
        keys = reference.sample_keys(args["seed"], len(x0))
    if keys is not None:
        noise = reference.normals(keys, x0.shape, args["stream"], torch.float64)
    broadcast = (-1, *[1] * (x0.dim() - 1))
    signal = a[t].view(broadcast) * x
    added = 0 if noise is None else b[t].view(broadcast) * noise.double()
    return signal + added, signal.abs() + (0 if noise is None else added.abs())


@pytest.mark.parametrize(("case", "implementation"), case_params(CASES, "x0", "layout"))
def test_forward(case: Case, implementation: str) -> None:
    args = arguments(case)
    (x_t,) = evaluate("q_sample", implementation, args).outputs
    value, magnitude = expected(args)
    assert x_t.dtype == (args["dtype"] or FLOATS.get(case.x0, torch.float32))
    assert_close(
        x_t,
        value,
        magnitude=magnitude,
        operations=OPERATIONS[case.mode],
        implementation=implementation,
    )
    if "channels_last" in case.layout and implementation != "reference":
        last = torch.channels_last if x_t.dim() == 4 else torch.channels_last_3d
        assert x_t.is_contiguous(memory_format=last)


@pytest.mark.parametrize("implementation", implementation_params())
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(dtype: str, layout: str, implementation: str) -> None:
    """d x_t / d x0 = sqrt(abar_t) (mirrored back), d x_t / d noise = sqrt(1 - abar_t)."""
    args = arguments(Case(shape="odd", layout=layout, x0=dtype, flip=True))
    grad = torch.randn(SHAPES["odd"]).to(FLOATS[dtype])
    # A gradient in the other memory format, as a convolution may hand back.
    grad = arrange(grad, "contiguous" if layout == "channels_last" else "channels_last")
    result = evaluate("q_sample", implementation, args, gradients=("x0", "noise"), grad_output=grad)
    t = args["t"]
    a = args["sqrt_alpha_bar"].double()[t].view(-1, 1, 1, 1)
    b = args["sqrt_one_minus_alpha_bar"].double()[t].view(-1, 1, 1, 1)
    mirrored = torch.where(args["flip"].view(-1, 1, 1, 1), grad.flip(-1), grad).double()
    for name, value in (("x0", a * mirrored), ("noise", b * grad.double())):
        assert_close(
            result.gradients[name],
            value,
            magnitude=value.abs(),
            operations=2,
            implementation=implementation,
        )


GPU_IMPLEMENTATIONS = ("triton-interpreted", "triton-ptx", "cuda-ptx", "cuda", "triton")


@pytest.mark.parametrize("implementation", implementation_params(*GPU_IMPLEMENTATIONS))
def test_timesteps_out_of_range_are_nan(implementation: str) -> None:
    """On a device, where raising would wait for it: nothing is read outside the tables."""
    args = arguments(Case(shape="odd", mode="given"))
    args["t"] = torch.tensor([-1, 7, T][: len(args["x0"])])
    (x_t,) = evaluate("q_sample", implementation, args).outputs
    outside = (args["t"] < 0) | (args["t"] >= T)
    assert outside.any()
    assert torch.equal(x_t.isnan().flatten(1).all(1), outside)
    assert torch.equal(x_t.isnan().flatten(1).any(1), outside)


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["given", "seed"])
def test_traffic(mode: str, dtype: str, layout: str, arch: str, implementation: str) -> None:
    """One launch that moves each tensor once, coalesced, 16 bytes at a time."""
    args = arguments(Case(shape="several chunks", layout=layout, x0=dtype, mode=mode))
    result = evaluate("q_sample", implementation, args, arch=arch, count=True)
    (launch,) = result.launches
    size = args["x0"].numel() * args["x0"].element_size()
    tensors = [array for array in launch.counters.arrays if array.size >= size]
    assert len(tensors) == (3 if mode == "given" else 2)
    # Every thread also reads its sample's coefficients, which stay in the cache: once is counted.
    small = [array for array in launch.counters.arrays if array.size < size]
    moved = sum(array.loaded_bytes + array.stored_bytes for array in tensors)
    moved += sum(array.unique_loaded_bytes for array in small)
    assert moved <= 1.05 * len(tensors) * size
    requests = sum((a.load_requests + a.store_requests for a in tensors), Requests())
    assert set(requests.widths) == {16}
    assert requests.sectors <= 1.05 * requests.min_sectors


def test_differentiable_twice() -> None:
    args = arguments(Case(shape="odd", flip=True))
    x0, noise = (args[k].double().requires_grad_() for k in ("x0", "noise"))

    def f(x0: Tensor, noise: Tensor) -> Tensor:
        tables = (args["sqrt_alpha_bar"], args["sqrt_one_minus_alpha_bar"])
        return ops.q_sample(x0, args["t"], *tables, noise, flip=args["flip"])

    assert torch.autograd.gradcheck(f, (x0, noise))
    assert torch.autograd.gradgradcheck(f, (x0, noise))


def test_forward_mode_and_functorch() -> None:
    """Tangents: x_t' = sqrt(abar_t) x0' + sqrt(1 - abar_t) noise', and torch.func.grad."""
    args = arguments(Case(shape="odd", flip=True))
    a, b = args["sqrt_alpha_bar"], args["sqrt_one_minus_alpha_bar"]
    x0, noise = args["x0"], args["noise"]

    def f(x0: Tensor, noise: Tensor) -> Tensor:
        return ops.q_sample(x0, args["t"], a, b, noise, flip=args["flip"])

    tangents = torch.randn_like(x0), torch.randn_like(noise)
    _, tangent = torch.func.jvp(f, (x0, noise), tangents)
    torch.testing.assert_close(tangent, f(*tangents))
    gradient = torch.func.grad(lambda x: f(x, noise).square().sum())(x0)
    leaf = x0.clone().requires_grad_()
    f(leaf, noise).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("mode", ["given", "seed", "keys"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout: str, mode: str) -> None:
    args = arguments(Case(shape="odd", layout=layout, mode=mode, flip=True))
    args["x0"].requires_grad_()
    torch.library.opcheck(torch.ops.fastdiff.q_sample.default, tuple(args.values()))


def test_compiles_once_for_every_batch_seed_and_stream() -> None:
    torch._dynamo.reset()
    a, b = tables()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def f(x0: Tensor, t: Tensor, seed: int, stream: int) -> Tensor:
        return ops.q_sample(x0 * 1, t, a, b, seed=seed, stream=stream) + 1

    # Sizes that differ from the other dimensions: torch.compile specializes on equal ones.
    for batch, seed, stream in ((5, 11, 2), (4, 12, 3), (7, 10**12, 2**40)):
        x0, t = torch.randn(batch, 3, 6, 6), torch.arange(batch)
        eager = ops.q_sample(x0, t, a, b, seed=seed, stream=stream) + 1
        assert torch.equal(f(x0, t, seed, stream), eager)
    assert len(graphs) == 1, f"{len(graphs)} graphs: something recompiled"


def test_compiles_with_inductor_and_gradients() -> None:
    torch._dynamo.reset()
    a, b = tables()
    x0, t = torch.randn(3, 3, 6, 6, requires_grad=True), torch.tensor([0, 500, 999])
    noise = torch.randn_like(x0)

    def loss(x0: Tensor) -> Tensor:
        return ops.q_sample(x0, t, a, b, noise).square().sum()

    (eager,) = torch.autograd.grad(loss(x0), x0)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x0), x0)
    torch.testing.assert_close(compiled, eager)


def test_learned_tables_use_the_reference() -> None:
    a, b = (x.requires_grad_() for x in tables())
    args = arguments(Case())
    ops.q_sample(args["x0"], args["t"], a, b, args["noise"]).sum().backward()
    expected_gradient = torch.zeros(T).index_add(0, args["t"], args["x0"].flatten(1).sum(1))
    torch.testing.assert_close(a.grad, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_timestep_adds_zero_noise(dtype: str) -> None:
    """Half-precision tables add no noise at all at some timesteps, a known defect elsewhere."""
    a, b = tables()
    x_t = ops.q_sample(
        torch.zeros(T, 16, dtype=FLOATS[dtype]),
        torch.arange(T),
        a,
        b,
        torch.ones(T, 16, dtype=FLOATS[dtype]),
    )
    assert (x_t != 0).all()
    relative = (x_t.double() / b.double()[:, None] - 1).abs().max()
    assert relative <= 2 * torch.finfo(FLOATS[dtype]).eps / 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_error_no_larger_than_eager(dtype: str) -> None:
    args = arguments(Case(shape="several chunks", x0=dtype))
    value, _ = expected(args)
    t = args["t"]
    a, b = (x[t].view(-1, 1, 1, 1) for x in tables())
    # What one writes by hand, with the coefficients in the tensors' dtype.
    by_hand = a.to(FLOATS[dtype]) * args["x0"] + b.to(FLOATS[dtype]) * args["noise"]
    fused = ops.q_sample(args["x0"], t, *tables(), args["noise"])
    fused_error = (fused.double() - value).abs().max().item()
    eager_error = (by_hand.double() - value).abs().max().item()
    print(f"{dtype}: largest error fused {fused_error:.3g}, eager {eager_error:.3g}")
    assert fused_error <= eager_error


def test_generated_noise_is_philox_normal() -> None:
    a, b = tables()
    x0, t = torch.zeros(5, 3, 9, 7), torch.tensor([999, 3, 500, 0, 7])
    noise = ops.philox_normal(x0.shape, seed=12, stream=34)
    generated = ops.q_sample(x0, t, a, b, seed=12, stream=34)
    assert torch.equal(generated, ops.q_sample(x0, t, a, b, noise))
    again = ops.q_sample(x0, t, a, b, seed=12, stream=34)
    assert torch.equal(generated, again)


def test_autocast_casts_nothing() -> None:
    args = arguments(Case())
    with torch.autocast("cpu", torch.bfloat16):
        x_t = ops.q_sample(args["x0"], args["t"], *tables(), args["noise"])
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, ops.q_sample(args["x0"], args["t"], *tables(), args["noise"]))


@hypothesis.given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    data=st.data(),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_shape_and_strides(shape: list[int], data: st.DataObject) -> None:
    """Any permutation of dimensions and any step: the result is that of the contiguous copy."""
    order = data.draw(st.permutations(range(len(shape))))
    steps = data.draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    stored = [shape[d] * s for d, s in zip(order, steps, strict=True)]
    base = torch.randn(stored, generator=torch.Generator().manual_seed(sum(stored)))
    base = base[tuple(slice(None, None, s) for s in steps)]
    x0 = base.permute([order.index(d) for d in range(len(shape))])
    assert list(x0.shape) == shape
    a, b = tables()
    t = torch.arange(shape[0]) * 50
    x_t = ops.q_sample(x0, t, a, b, seed=3)
    dense = ops.q_sample(x0.contiguous(), t, a, b, seed=3)
    assert torch.equal(x_t, dense)


BAD_INPUT = [
    ({"x0": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x0 has dtype torch.int32"),
    ({"x0": torch.tensor(1.0)}, ValueError, r"x0 has shape \(\)"),
    ({"t": torch.tensor([1, 2, 3])}, ValueError, r"t has shape \(3,\), expected \(2,\)"),
    ({"t": torch.tensor([1.0, 2.0])}, TypeError, "t has dtype torch.float32"),
    ({"t": torch.tensor([1, T])}, IndexError, r"expected 0 <= t < 1000"),
    ({"t": torch.tensor([-1, 0])}, IndexError, "t has values from -1 to 0"),
    ({"noise": None}, ValueError, "pass either noise or seed; neither was given"),
    ({"seed": 3}, ValueError, "pass either noise or seed; both was given"),
    ({"noise": torch.zeros(2, 4)}, ValueError, r"noise has shape \(2, 4\), expected \(2, 3\)"),
    ({"noise": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "noise has dtype torch.int64"),
    ({"noise": torch.zeros(2, 3, device="meta")}, ValueError, "noise is on meta, expected cpu"),
    ({"noise": None, "seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed has shape"),
    ({"noise": None, "seed": torch.zeros(2)}, TypeError, "seed has dtype torch.float32"),
    ({"noise": None, "seed": "a"}, TypeError, "seed is 'a', expected an int"),
    ({"stream": 1.0}, TypeError, "stream is 1.0, expected an int"),
    ({"flip": torch.zeros(2)}, TypeError, "flip has dtype torch.float32"),
    ({"flip": torch.zeros(3, dtype=torch.bool)}, ValueError, r"flip has shape \(3,\)"),
    ({"dtype": torch.int8}, TypeError, "dtype has dtype torch.int8"),
    ({"sqrt_alpha_bar": torch.zeros(9)}, ValueError, "has 1000 entries, expected 9"),
    ({"sqrt_alpha_bar": torch.zeros(T, 1)}, ValueError, r"sqrt_alpha_bar has shape \(1000, 1\)"),
    ({"sqrt_alpha_bar": torch.zeros(T).half()}, TypeError, "sqrt_alpha_bar has dtype"),
]


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type, message: str, backend: str) -> None:
    a, b = tables()
    good = {
        "x0": torch.zeros(2, 3),
        "t": torch.tensor([1, 2]),
        "sqrt_alpha_bar": a,
        "sqrt_one_minus_alpha_bar": b,
        "noise": torch.zeros(2, 3),
    }
    chosen = fastdiff.use_backend("reference") if backend == "reference" else nullcontext()
    with chosen, pytest.raises(error, match=message):
        ops.q_sample(**{**good, **change})


RAW_OVERLOADS = [
    pytest.param(
        "default",
        marks=pytest.mark.skipif(
            available("cpu") is not None, reason="the CPU library is not built"
        ),
    ),
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            available("triton-ptx") is not None, reason="triton is not installed"
        ),
    ),
]


@pytest.mark.parametrize("overload", RAW_OVERLOADS)
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_raw_operator_refuses_bad_input(
    change: dict, error: type, message: str, overload: str
) -> None:
    """The bindings alone keep the kernels memory-safe: raw operators skip the Python checks."""
    a, b = tables()
    args = {
        "x0": torch.zeros(2, 3),
        "t": torch.tensor([1, 2]),
        "sqrt_alpha_bar": a,
        "sqrt_one_minus_alpha_bar": b,
        "noise": torch.zeros(2, 3),
        "keys": None,
        "seed": None,
        "stream": 0,
        "flip": None,
        "dtype": None,
    }
    args.update(change)
    if isinstance(args["seed"], Tensor):
        args["seed"], args["keys"] = None, args["seed"]
    if args["noise"] is None and args["seed"] is None and args["keys"] is None:
        pytest.skip("without noise and seed the raw operator computes the mean")
    if overload == "triton" and error is IndexError:
        pytest.skip("Triton kernels answer timesteps out of range with NaN")
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)):
        getattr(torch.ops.fastdiff.q_sample, overload)(*args.values())
