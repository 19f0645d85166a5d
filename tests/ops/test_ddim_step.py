"""ddim_step: every implementation against the float64 reference, forward and gradients."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from op_harness import ON_GPU, assert_close, available, evaluate, implementation_params
from op_harness.inputs import SHAPES, arrange
from op_harness.sampler_step import (
    FLOATS,
    GENERATED_OPERATIONS,
    X0_OPERATIONS,
    X_S_OPERATIONS,
    Case,
    arguments,
    assert_traffic,
    exhaustive,
    expected,
    forward_params,
    magnitudes,
    strided,
    table_for,
    widened,
)
from torch import Tensor

import fastdiff
from fastdiff import ops, reference
from fastdiff.ops._sampler_step import Arguments, run_reference
from fastdiff.reference.step_columns import PREDICTIONS

OP = "ddim_step"

CASES = [
    # The formulas, with and without clipping, from clipped and from kept eps.
    *(
        Case(shape="odd", prediction=p, clip=clip, flag=flag, return_pred_x0=True)
        for p in PREDICTIONS
        for clip, flag in ((True, True), (True, False), (False, True))
    ),
    *(
        Case(x=x, guided=True, flag=True, mode=m)
        for x in ("fp32", "bf16", "fp16")
        for m in ("none", "given", "seed")
    ),
    *(
        Case(x=x, layout="channels_last", guided=True, mode=mode, return_pred_x0=mode == "seed")
        for x in ("fp32", "bf16", "fp16")
        for mode in ("none", "seed")
    ),
    *(Case(shape=shape, guided=True, mode="seed") for shape in SHAPES if shape != "vectors"),
    *(
        Case(shape=shape, layout="channels_last", x=x, mode="seed")
        for shape, x in (("odd", "bf16"), ("many channels", "fp32"), ("volume", "bf16"))
    ),
    *(
        Case(shape=shape, layout=layout, x=x, two_heads=True, guided=True, prediction="v")
        for shape, layout, x in (
            ("vectors", "contiguous", "fp32"),
            ("vectors", "channels_last", "fp32"),
            ("vectors", "channels_last", "bf16"),
            ("volume", "channels_last", "fp32"),
            ("odd", "channels_last", "fp32"),
            ("rows", "contiguous", "bf16"),
        )
    ),
    *(
        Case(layout=layout, x=x, guided=True, mode=mode)
        for layout in ("sliced", "sliced channels_last", "expanded", "misaligned")
        for x, mode in (("fp32", "given"), ("bf16", "seed"))
    ),
    # Mixed dtypes: a float32 state with a half-precision model is what samplers do.
    *(
        Case(x=x, output=output, guided=True, mode="seed", return_pred_x0=True)
        for x, output in (("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp32"), ("fp16", "bf16"))
    ),
    Case(x="fp32", output="bf16", layout="channels_last", two_heads=True, guided=True),
    *(Case(x="bf16", noise="fp32"), Case(x="fp32", noise="bf16"), Case(x="bf16", mode="keys")),
]


def check(case: Case, implementation: str) -> None:
    args = arguments(OP, case)
    x_s, pred_x0 = evaluate(OP, implementation, args).outputs
    value, x0 = expected(OP, args)
    magnitude, x0_magnitude = magnitudes(OP, args)
    assert x_s.dtype == args["x_t"].dtype
    assert_close(
        x_s,
        value,
        magnitude=magnitude,
        operations=X_S_OPERATIONS + GENERATED_OPERATIONS * (case.mode in ("seed", "keys")),
        implementation=implementation,
    )
    if case.return_pred_x0:
        assert_close(
            pred_x0,
            x0,
            magnitude=x0_magnitude,
            operations=X0_OPERATIONS,
            implementation=implementation,
        )
    else:
        assert pred_x0.shape == (0,)
    if "channels_last" in case.layout and x_s.numel() > 0:  # an empty tensor has every format
        last = torch.channels_last if x_s.dim() == 4 else torch.channels_last_3d
        assert x_s.is_contiguous(memory_format=last)


# What only a compiled Triton kernel can get wrong: each branch once, and all dtypes.
COMPILED = [
    Case(shape="odd", prediction="mean", clip=True, flag=False, return_pred_x0=True),
    Case(x="bf16", guided=True, flag=True, mode="seed"),
    Case(shape="odd", layout="channels_last", x="bf16", mode="seed"),
    Case("odd", "channels_last", two_heads=True, guided=True, prediction="v"),
    Case(output="fp16", guided=True, mode="seed", return_pred_x0=True),
]


@pytest.mark.parametrize(("case", "implementation"), forward_params(CASES, COMPILED))
def test_forward(case: Case, implementation: str) -> None:
    check(case, implementation)


@pytest.mark.parametrize("implementation", implementation_params("reference", "cpu"))
@pytest.mark.parametrize("two_heads", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float64(prediction: str, layout: str, two_heads: bool, implementation: str) -> None:
    check(
        Case(
            shape="odd",
            x="fp64",
            layout=layout,
            prediction=prediction,
            two_heads=two_heads,
            guided=True,
            return_pred_x0=True,
        ),
        implementation,
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", implementation_params())
@pytest.mark.parametrize(("prediction", "shape", "layout", "x", "modes"), exhaustive())
def test_forward_exhaustive(
    prediction: str, shape: str, layout: str, x: str, modes: tuple[str, ...], implementation: str
) -> None:
    flags = ((True, True, False, True), (True, False, True, True), (False, False, False, False))
    for (clip, flag, two_heads, guided), mode in zip(flags, modes, strict=True):
        check(
            Case(shape, layout, x, None, prediction, clip, flag, two_heads, guided, mode,
                 return_pred_x0=True),
            implementation,
        )  # fmt: skip


@pytest.mark.parametrize("implementation", implementation_params())
@pytest.mark.parametrize(("prediction", "flag"), [("eps", True), ("v", False), ("mean", False)])
def test_gradients(prediction: str, flag: bool, implementation: str) -> None:
    """Those of the float64 reference, the clip's included."""
    names = ("x_t", "model_output", "uncond", "noise")
    case = Case(shape="odd", prediction=prediction, flag=flag, guided=True, two_heads=True)
    args = arguments(OP, case)
    grad = torch.randn(SHAPES["odd"])
    result = evaluate(OP, implementation, args, gradients=names, grad_output=grad)
    wide = widened(args)
    wide = wide._replace(**{k: getattr(wide, k).requires_grad_() for k in names})
    x_s, _ = run_reference(OP, wide)
    inputs = [getattr(wide, k) for k in names]
    for name, value in zip(names, torch.autograd.grad(x_s, inputs, grad.double()), strict=True):
        # The largest factor of a gradient is that of x0 from the output (7,800 for a mean), which
        # takes a handful of roundings.
        assert result.gradients[name].dtype == torch.float32
        torch.testing.assert_close(
            result.gradients[name].double(),
            value,
            rtol=16 * 2**-24,
            atol=16 * 2**-24 * value.abs().max().item(),
        )
    # The variance channels are not read.
    assert not result.gradients["model_output"][:, 3:].any()


def test_differentiable_twice() -> None:
    args = arguments(OP, Case(shape="odd", prediction="v", flag=True, guided=True))
    wide = widened(args)

    def f(x_t: Tensor, output: Tensor, uncond: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ddim_step(
            x_t,
            output,
            wide.step,
            wide.table,
            prediction="v",
            uncond=uncond,
            guidance_scale=2.5,
            noise=noise,
            return_pred_x0=True,
        )

    inputs = [
        x[:, :1, :2, :2].clone().requires_grad_()
        for x in (wide.x_t, wide.model_output, wide.uncond, wide.noise)
    ]
    # Steps small against the distance of x0 from the clip's corners.
    assert torch.autograd.gradcheck(f, inputs, eps=1e-7)
    assert torch.autograd.gradgradcheck(lambda *x: f(*x)[0] ** 2, inputs, eps=1e-7)


def test_functorch_uses_the_reference() -> None:
    args = Arguments(**arguments(OP, Case(shape="odd")))

    def f(x: Tensor) -> Tensor:
        return ops.ddim_step(x, args.model_output, args.step, args.table).square().sum()

    leaf = args.x_t.clone().requires_grad_()
    f(leaf).backward()
    torch.testing.assert_close(torch.func.grad(f)(args.x_t), leaf.grad)


def test_a_table_that_requires_grad_uses_the_reference() -> None:
    args = Arguments(**arguments(OP, Case(shape="odd")))
    table = args.table.clone().requires_grad_()
    ops.ddim_step(args.x_t, args.model_output, args.step, table, noise=args.noise).sum().backward()
    sigma = torch.zeros(len(table)).index_add(0, args.step, args.noise.flatten(1).sum(1))
    column = reference.StepColumn.SIGMA
    torch.testing.assert_close(table.grad[:, column], sigma, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
@pytest.mark.parametrize(("arch", "x"), [("sm_80", "bf16"), ("sm_90", "fp32")])
@pytest.mark.parametrize(
    ("layout", "mode"), [("contiguous", "none"), ("channels_last", "none"), ("contiguous", "seed")]
)
def test_traffic(layout: str, mode: str, arch: str, x: str, implementation: str) -> None:
    """A guided step is one launch that moves four tensors once, coalesced, 16 bytes at a time."""
    args = arguments(
        OP, Case(shape="several chunks", layout=layout, x=x, guided=True, flag=True, mode=mode)
    )
    result = evaluate(OP, implementation, args, arch=arch, count=True)
    (launch,) = result.launches
    assert_traffic(launch, args, 4)


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
def test_two_heads_are_read_in_place(implementation: str) -> None:
    """Of a 2C-channel output only the first half is read, where it lies."""
    args = arguments(OP, Case(shape="several chunks", guided=True, two_heads=True, mode="none"))
    (launch,) = evaluate(OP, implementation, args, count=True).launches
    assert_traffic(launch, args, 4)


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
def test_a_large_image_fills_the_device(implementation: str) -> None:
    x = torch.randn(1, 3, 160, 160)
    step, table = torch.tensor([2]), table_for(OP)
    args = Arguments(x, x, step, table, 0, True, True, x, 2.0, None, None, None, 0, False)
    launches = evaluate(OP, implementation, args._asdict(), racecheck=False).launches
    assert launches[0].blocks >= 132  # one block per 512 elements


@pytest.mark.parametrize("mode", ["given", "seed", "keys", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout: str, mode: str) -> None:
    case = Case(shape="odd", layout=layout, mode=mode, guided=True, return_pred_x0=mode == "seed")
    args = arguments(OP, case)
    for name in ("x_t", "model_output", "uncond"):
        args[name].requires_grad_()
    torch.library.opcheck(torch.ops.fastdiff.ddim_step.default, tuple(args.values()))


def test_compiles_once_for_every_batch_seed_and_stream() -> None:
    torch._dynamo.reset()
    table = table_for(OP)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def f(x: Tensor, output: Tensor, step: Tensor, seed: int, stream: int) -> Tensor:
        return ops.ddim_step(x * 1, output, step, table, seed=seed, stream=stream) + 1

    # Sizes that differ from the other dimensions: torch.compile specializes on equal ones.
    for batch, seed, stream in ((5, 11, 2), (4, 12, 3), (7, 10**12, 2**40)):
        x, output = torch.randn(2, batch, 3, 6, 6)
        step = torch.arange(batch) % 6
        eager = ops.ddim_step(x, output, step, table, seed=seed, stream=stream) + 1
        assert torch.equal(f(x, output, step, seed, stream), eager)
    assert len(graphs) == 1, f"{len(graphs)} graphs: something recompiled"


def test_compiles_with_inductor_and_gradients() -> None:
    torch._dynamo.reset()
    args = Arguments(**arguments(OP, Case(shape="odd", guided=True)))
    x = args.x_t.clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        x_s, pred_x0 = ops.ddim_step(
            x,
            args.model_output,
            args.step,
            args.table,
            uncond=args.uncond,
            guidance_scale=2.0,
            noise=args.noise,
            return_pred_x0=True,
        )
        return x_s.square().sum() + pred_x0.sum()

    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_error_no_larger_than_eager(dtype: str) -> None:
    args = Arguments(**arguments(OP, Case(shape="several chunks", x=dtype, guided=True, flag=True)))
    value, _ = expected(OP, args._asdict())
    row = args.table.to(FLOATS[dtype])[args.step]
    a, s, coef_x0, coef_eps, sigma = (row[:, k].view(-1, 1, 1, 1) for k in (0, 1, 8, 10, 11))
    # What one writes by hand, with the coefficients in the tensors' dtype.
    output = args.uncond + args.guidance_scale * (args.model_output - args.uncond)
    x0 = ((args.x_t - s * output) / a).clamp(-1, 1)
    by_hand = coef_x0 * x0 + coef_eps * ((args.x_t - a * x0) / s) + sigma * args.noise
    fused, _ = torch.ops.fastdiff.ddim_step(*args)
    fused_error = (fused.double() - value).abs().max().item()
    eager_error = (by_hand.double() - value).abs().max().item()
    print(f"{dtype}: largest error fused {fused_error:.3g}, eager {eager_error:.3g}")
    assert fused_error <= eager_error


def test_generated_noise_is_philox_normal_and_runs_are_equal() -> None:
    args = Arguments(**arguments(OP, Case(shape="odd")))
    first = (args.x_t, args.model_output, args.step, args.table)
    generated = ops.ddim_step(*first, seed=12, stream=34)
    noise = ops.philox_normal(args.x_t.shape, seed=12, stream=34)
    assert torch.equal(generated, ops.ddim_step(*first, noise=noise))
    assert torch.equal(generated, ops.ddim_step(*first, seed=12, stream=34))
    assert not torch.equal(generated, ops.ddim_step(*first, seed=12, stream=35))


@pytest.mark.parametrize("implementation", implementation_params())
def test_an_infinite_output_is_clipped(implementation: str) -> None:
    """As in the reference: the step goes on from x0 = -1 or 1, and NaN stays NaN."""
    args = arguments(OP, Case(shape="odd", flag=True, mode="none", return_pred_x0=True))
    args["model_output"].flatten()[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    x_s, pred_x0 = evaluate(OP, implementation, args).outputs
    assert pred_x0.flatten()[:2].tolist() == [-1, 1]
    assert x_s.flatten()[:2].isfinite().all()
    assert pred_x0.flatten()[2].isnan()
    assert x_s.flatten()[2].isnan()
    assert x_s.isnan().sum() == 1


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx", *ON_GPU))
def test_a_step_outside_the_table_is_nan_on_gpus(implementation: str) -> None:
    args = arguments(OP, Case(shape="odd", return_pred_x0=True))
    args["step"] = torch.tensor([1, 6, -1])
    for result in evaluate(OP, implementation, args).outputs:
        assert result[0].isfinite().all()
        assert result[1:].isnan().all()


def test_autocast_casts_nothing() -> None:
    args = Arguments(**arguments(OP, Case(shape="odd", output="bf16")))
    first = (args.x_t, args.model_output, args.step, args.table)
    with torch.autocast("cpu", torch.bfloat16):
        x_s = ops.ddim_step(*first, seed=1)
    assert x_s.dtype == torch.float32
    assert torch.equal(x_s, ops.ddim_step(*first, seed=1))


@hypothesis.given(
    shape=st.lists(st.integers(0, 7), min_size=2, max_size=5),
    two_heads=st.booleans(),
    data=st.data(),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_shape_and_strides(shape: list[int], two_heads: bool, data: st.DataObject) -> None:
    """Any permutation of dimensions and any step: the result is that of the contiguous copy."""
    x = strided(data, shape, 1)
    output = strided(data, [shape[0], shape[1] * (1 + two_heads), *shape[2:]], 2)
    step = torch.arange(shape[0]) % 6
    results = [
        ops.ddim_step(x, output, step, table_for(OP), seed=3)
        for x, output in ((x, output), (x.contiguous(), output.contiguous()))
    ]
    assert torch.equal(*results)


def test_only_the_reference_makes_float64_noise() -> None:
    args = Arguments(**arguments(OP, Case(shape="odd", x="fp64")))
    first = (args.x_t, args.model_output, args.step, args.table)
    noise = reference.philox_normal(args.x_t.shape, 3, dtype=torch.float64)
    torch.testing.assert_close(ops.ddim_step(*first, seed=3), ops.ddim_step(*first, noise=noise))
    if available("cpu") is None:
        with (
            fastdiff.use_backend("cpu"),
            pytest.raises(RuntimeError, match="not with generated noise"),
        ):
            ops.ddim_step(*first, seed=3)


def test_layout_of_the_output_follows_x_t() -> None:
    args = Arguments(**arguments(OP, Case(guided=True)))
    last = arrange(args.model_output, "channels_last")
    plain = ops.ddim_step(args.x_t, args.model_output, args.step, args.table, noise=args.noise)
    mixed = ops.ddim_step(args.x_t, last, args.step, args.table, noise=args.noise)
    assert mixed.is_contiguous()
    assert torch.equal(plain, mixed)
