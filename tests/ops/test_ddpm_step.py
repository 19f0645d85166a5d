"""ddpm_step: every implementation against the float64 reference, forward and gradients."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from op_harness import assert_close, evaluate, implementation_params
from op_harness.inputs import SHAPES
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
from fastdiff import ops
from fastdiff.ops._sampler_step import Arguments, run_reference
from fastdiff.reference.step_columns import PREDICTIONS, StepColumn

OP = "ddpm_step"


def learned(**options: object) -> Case:
    return Case(flag=True, two_heads=True, **options)


CASES = [
    *(
        Case(shape="odd", prediction=p, clip=clip, return_pred_x0=True)
        for p in PREDICTIONS
        for clip in (True, False)
    ),
    *(Case(x=x, guided=True, mode="seed") for x in ("bf16", "fp16")),
    *(learned(x=x, guided=True, mode="given") for x in ("fp32", "bf16", "fp16")),
    *(
        learned(shape=shape, layout=layout, x=x, mode=mode, prediction="v", return_pred_x0=True)
        for shape, layout, x, mode in (
            ("vectors", "channels_last", "fp32", "seed"),
            ("several chunks", "channels_last", "bf16", "given"),
            ("odd", "channels_last", "bf16", "given"),
            ("volume", "channels_last", "fp32", "given"),
            ("many channels", "channels_last", "fp32", "seed"),
            (
                "many channels",
                "channels_last",
                "bf16",
                "given",
            ),  # 8 do not divide the 260 of a head
            ("pictures", "channels_last", "fp16", "keys"),
            ("vectors", "misaligned channels_last", "bf16", "given"),
        )
    ),
    # Vectors of x are 4 elements, at 8 bytes of the output: too little for its tile.
    learned(layout="misaligned channels_last", x="fp32", output="bf16", guided=True),
    learned(layout="channels_last", x="fp32", output="bf16", guided=True, mode="seed"),
    *(learned(shape=shape) for shape in SHAPES if shape != "vectors"),
    *(
        learned(layout=layout, x=x, guided=True)
        for layout in ("sliced", "sliced channels_last", "expanded", "misaligned")
        for x in ("fp32", "bf16")
    ),
    *(learned(x="fp32", output=output, mode="seed") for output in ("bf16", "fp16")),
    *(learned(x="bf16", output="fp32"), Case(x="bf16", noise="fp32"), Case(mode="keys")),
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
        operations=X_S_OPERATIONS + GENERATED_OPERATIONS * (case.mode != "given"),
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
    if "channels_last" in case.layout and x_s.numel() > 0:  # an empty tensor has every format
        last = torch.channels_last if x_s.dim() == 4 else torch.channels_last_3d
        assert x_s.is_contiguous(memory_format=last)


COMPILED = [
    learned(x="bf16", guided=True, mode="given"),
    learned(shape="odd", layout="channels_last", x="bf16", prediction="v", return_pred_x0=True),
    learned(output="fp16", mode="seed"),
]


@pytest.mark.parametrize(("case", "implementation"), forward_params(CASES, COMPILED))
def test_forward(case: Case, implementation: str) -> None:
    check(case, implementation)


@pytest.mark.parametrize("implementation", implementation_params("reference", "cpu"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", [Case(shape="odd", x="fp64"), learned(shape="odd", x="fp64")])
def test_float64(case: Case, layout: str, implementation: str) -> None:
    for prediction in PREDICTIONS:
        check(Case(**{**vars(case), "layout": layout, "prediction": prediction}), implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", implementation_params())
@pytest.mark.parametrize(("prediction", "shape", "layout", "x", "modes"), exhaustive())
def test_forward_exhaustive(
    prediction: str, shape: str, layout: str, x: str, modes: tuple[str, ...], implementation: str
) -> None:
    one, other = [mode for mode in modes if mode != "none"]
    for has_variance, clip, guided, mode in (
        (True, True, True, one),
        (True, False, False, other),
        (False, True, True, other),
        (False, False, False, one),
    ):
        check(
            Case(shape, layout, x, None, prediction, clip, has_variance, has_variance, guided, mode,
                 return_pred_x0=True),
            implementation,
        )  # fmt: skip


@pytest.mark.parametrize("implementation", implementation_params())
@pytest.mark.parametrize("prediction", ["eps", "mean"])
def test_gradients(prediction: str, implementation: str) -> None:
    """Those of the float64 reference: the clip's and the variance channels' included."""
    names = ("x_t", "model_output", "uncond", "noise")
    args = arguments(OP, learned(shape="odd", prediction=prediction, guided=True))
    grad = torch.randn(SHAPES["odd"])
    result = evaluate(OP, implementation, args, gradients=names, grad_output=grad)
    wide = widened(args)
    wide = wide._replace(**{k: getattr(wide, k).requires_grad_() for k in names})
    x_s, _ = run_reference(OP, wide)
    inputs = [getattr(wide, k) for k in names]
    for name, value in zip(names, torch.autograd.grad(x_s, inputs, grad.double()), strict=True):
        torch.testing.assert_close(
            result.gradients[name].double(),
            value,
            rtol=16 * 2**-24,
            atol=16 * 2**-24 * value.abs().max().item(),
        )
    assert result.gradients["model_output"][:, 3:].any()
    assert not result.gradients["uncond"][:, 3:].any()


def test_differentiable_twice() -> None:
    wide = widened(arguments(OP, learned(shape="odd", prediction="v", guided=True)))

    def f(x_t: Tensor, output: Tensor, uncond: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ddpm_step(
            x_t,
            output,
            wide.step,
            wide.table,
            prediction="v",
            learned_range=True,
            uncond=uncond,
            guidance_scale=2.5,
            noise=noise,
            return_pred_x0=True,
        )

    x_t, noise = (x[:, :1, :2, :2].clone().requires_grad_() for x in (wide.x_t, wide.noise))
    heads = [x[:, 2:4, :2, :2].clone().requires_grad_() for x in (wide.model_output, wide.uncond)]
    inputs = (x_t, *heads, noise)
    # Steps small against the distance of x0 from the clip's corners.
    assert torch.autograd.gradcheck(f, inputs, eps=1e-7)
    assert torch.autograd.gradgradcheck(lambda *x: f(*x)[0] ** 2, inputs, eps=1e-7)


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
@pytest.mark.parametrize(("arch", "x"), [("sm_80", "fp32"), ("sm_90", "bf16")])
def test_traffic(arch: str, x: str, implementation: str) -> None:
    """One launch: x_t, both heads of the output where they lie, the result."""
    args = arguments(OP, learned(shape="several chunks", x=x, mode="seed"))
    (launch,) = evaluate(OP, implementation, args, arch=arch, count=True).launches
    assert_traffic(launch, args, 4)


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("x", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["several chunks", "pictures"])
def test_traffic_of_channels_last_heads(shape: str, x: str, arch: str, implementation: str) -> None:
    """C mean and C variance channels per pixel: no copy, read once, by whole sectors."""
    args = arguments(OP, learned(shape=shape, layout="channels_last", x=x))
    (launch,) = evaluate(OP, implementation, args, arch=arch, count=True).launches
    assert_traffic(launch, args, 5)


@pytest.mark.cpu_kernels
def test_a_2c_output_is_not_copied() -> None:
    """All that is allocated is the result."""
    from torch.profiler import ProfilerActivity, profile

    args = Arguments(**arguments(OP, learned(shape="several chunks", layout="channels_last")))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.ops.fastdiff.ddpm_step(*args)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())
    assert allocated == args.x_t.nbytes


@pytest.mark.parametrize("mode", ["given", "seed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, mode: str) -> None:
    args = arguments(OP, learned(shape="odd", layout=layout, mode=mode, guided=True))
    for name in ("x_t", "model_output"):
        args[name].requires_grad_()
    torch.library.opcheck(torch.ops.fastdiff.ddpm_step.default, tuple(args.values()))


def test_compiles_once_for_every_batch_seed_and_stream() -> None:
    torch._dynamo.reset()
    table = table_for(OP)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def f(x: Tensor, output: Tensor, step: Tensor, seed: int, stream: int) -> Tensor:
        return ops.ddpm_step(
            x * 1, output, step, table, learned_range=True, seed=seed, stream=stream
        )

    for batch, seed, stream in ((5, 11, 2), (4, 12, 3), (7, 10**12, 2**40)):
        x, output = torch.randn(batch, 3, 6, 6), torch.randn(batch, 6, 6, 6)
        step = torch.arange(batch) % 6
        eager = ops.ddpm_step(x, output, step, table, learned_range=True, seed=seed, stream=stream)
        assert torch.equal(f(x, output, step, seed, stream), eager)
    assert len(graphs) == 1, f"{len(graphs)} graphs: something recompiled"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_error_no_larger_than_eager(dtype: str) -> None:
    args = Arguments(**arguments(OP, learned(shape="several chunks", x=dtype, guided=True)))
    value, _ = expected(OP, args._asdict())
    row = args.table.to(FLOATS[dtype])[args.step]
    c = StepColumn

    def column(k: StepColumn) -> Tensor:
        return row[:, k].view(-1, 1, 1, 1)

    # What one writes by hand, with the coefficients in the tensors' dtype.
    cond, v = args.model_output.chunk(2, 1)
    uncond, _ = args.uncond.chunk(2, 1)
    output = uncond + args.guidance_scale * (cond - uncond)
    a, s = column(c.SQRT_ALPHA_BAR), column(c.SQRT_ONE_MINUS_ALPHA_BAR)
    x0 = ((args.x_t - s * output) / a).clamp(-1, 1)
    log_variance = column(c.LOG_VARIANCE) + column(c.LOG_VARIANCE_SLOPE) * v
    sigma = (column(c.SIGMA) > 0) * (0.5 * log_variance).exp()
    by_hand = column(c.COEF_X0) * x0 + column(c.COEF_X_T) * args.x_t + sigma * args.noise
    fused, _ = torch.ops.fastdiff.ddpm_step(*args)
    fused_error = (fused.double() - value).abs().max().item()
    eager_error = (by_hand.double() - value).abs().max().item()
    print(f"{dtype}: largest error fused {fused_error:.3g}, eager {eager_error:.3g}")
    assert fused_error <= eager_error


def test_generated_noise_is_philox_normal_and_runs_are_equal() -> None:
    args = Arguments(**arguments(OP, learned(shape="odd")))
    first = (args.x_t, args.model_output, args.step, args.table)
    generated = ops.ddpm_step(*first, learned_range=True, seed=12, stream=34)
    noise = ops.philox_normal(args.x_t.shape, seed=12, stream=34)
    assert torch.equal(generated, ops.ddpm_step(*first, learned_range=True, noise=noise))
    assert torch.equal(generated, ops.ddpm_step(*first, learned_range=True, seed=12, stream=34))


@pytest.mark.parametrize("implementation", implementation_params())
def test_any_log_variance(implementation: str) -> None:
    """A table for variance="learned": v is the log variance itself; NaN stays NaN."""
    case = learned(shape="vectors", prediction="x0")
    args = arguments(OP, case)
    args["table"] = table_for(OP, "learned")
    v = args["model_output"][:, 3:]
    v.copy_(torch.linspace(-40, 10, v.numel()).view_as(v))
    value, _ = expected(OP, args)
    magnitude, _ = magnitudes(OP, args)
    (x_s, _) = evaluate(OP, implementation, args).outputs
    assert_close(x_s, value, magnitude=magnitude, operations=X_S_OPERATIONS)
    v[0, 0, 0, 0] = float("nan")
    (x_s, _) = evaluate(OP, implementation, args).outputs
    assert x_s.isnan().sum() == 1


@hypothesis.given(
    shape=st.lists(st.integers(0, 7), min_size=2, max_size=5),
    data=st.data(),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_shape_and_strides(shape: list[int], data: st.DataObject) -> None:
    """Any permutation of dimensions and any step: the result is that of the contiguous copy."""
    x, output = strided(data, shape, 1), strided(data, [shape[0], 2 * shape[1], *shape[2:]], 2)
    step = torch.arange(shape[0]) % 6
    results = [
        ops.ddpm_step(x, output, step, table_for(OP), learned_range=True, seed=3)
        for x, output in ((x, output), (x.contiguous(), output.contiguous()))
    ]
    assert torch.equal(*results)


X = torch.zeros(2, 3, 4)
BAD_INPUT = [
    ({"noise": None}, ValueError, "pass either noise or seed; neither was given"),
    ({"seed": 1}, ValueError, "pass either noise or seed; both were given"),
    ({"model_output": torch.zeros(2, 6, 4)}, ValueError, r"\(2, 6, 4\), expected \(2, 3, 4\)"),
    ({"learned_range": True}, ValueError, r"model_output has shape \(2, 3, 4\), expected \(2, 6"),
    (
        {"learned_range": True, "model_output": torch.zeros(2, 6, 4), "uncond": X},
        ValueError,
        r"uncond has shape \(2, 3, 4\), expected \(2, 6, 4\)",
    ),
    ({"uncond": X, "guidance_scale": -0.5}, ValueError, "guidance_scale is -0.5, expected"),
    ({"step": torch.tensor([0, 6])}, IndexError, "step has values from 0 to 6"),
    ({"noise": X.to("meta")}, ValueError, "noise is on meta, expected cpu"),
]


@pytest.mark.parametrize("overload", ["public", "reference", "default", "triton"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type, message: str, overload: str) -> None:
    """`test_ddim_step` has the list of what both refuse."""
    given = {
        "x_t": X,
        "model_output": X,
        "step": torch.tensor([1, 2]),
        "table": table_for(OP),
        "learned_range": False,
        "uncond": None,
        "guidance_scale": 1.0,
        "noise": X,
        "seed": None,
        **change,
    }
    if overload == "public":
        with pytest.raises(error, match=message):
            ops.ddpm_step(**given)
        return
    if overload == "reference":
        with fastdiff.use_backend("reference"), pytest.raises(error, match=message):
            ops.ddpm_step(**given)
        return
    if overload == "triton" and error is IndexError:
        pytest.skip("Triton kernels answer steps out of range with NaN")
    flag = given.pop("learned_range")
    args = Arguments(
        **given, prediction=0, clip=True, flag=flag, keys=None, stream=0, return_pred_x0=False
    )
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        getattr(torch.ops.fastdiff.ddpm_step, overload)(*args)


def test_variance_of_the_noise() -> None:
    """IDDPM eq. 15, from the schedule's own tables."""
    schedule = fastdiff.NoiseSchedule.linear(1000)
    step = torch.tensor([3, 5])
    spaced = schedule.respace(torch.tensor([0, 3, 40, 333, 700, 999]))
    x = torch.zeros(2, 1, 4, 4)
    noise = torch.ones_like(x)
    for v in (-1.0, 0.0, 1.0):
        output = torch.cat([x, torch.full_like(x, v)], 1)
        x_s = ops.ddpm_step(
            x, output, step, table_for(OP), prediction="x0", learned_range=True, noise=noise
        )
        upper = spaced.betas[step].log()
        lower = spaced.posterior_log_variance_clipped[step]
        sigma = (0.5 * (0.5 * (v + 1) * upper + 0.5 * (1 - v) * lower)).exp()
        torch.testing.assert_close(
            x_s, sigma.float().view(-1, 1, 1, 1).expand_as(x), rtol=1e-5, atol=0
        )
