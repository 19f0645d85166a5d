"""group_norm_silu where means are large beside deviations: constant groups, and ratios up to 1e7.

A constant group is h_hat = 0 exactly, whatever its value: a result that folds the mean into an
affine map, slope x + (offset - slope mean), rounds products of the size of slope mean. Every
implementation and every path is asked here; the CPU kernels' loops for other instruction sets by
test_instruction_sets.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from op_harness import assert_close, evaluate, implementation_params, unit_roundoff
from op_harness.group_norm_silu import FLOATS, OPERANDS, Exact, operations
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# (shape, num_groups). No number of elements in a group but that of "small" is a power of two.
SHAPES = {
    "small": ((4, 8, 4, 4), 4),
    "odd": ((4, 12, 7, 5), 3),
    "one value": ((4, 6, 1, 1), 6),
    "one pixel": ((4, 12, 1, 1), 4),
    "vectors": ((2, 24, 8, 12), 4),
    "large": ((1, 8, 60, 61), 2),  # threads share a group, whose rows are more than a piece
    "split odd": ((1, 3, 131, 129), 1),  # 198 KB: in CUDA no block of sm_80 holds it
    "cluster": ((1, 6, 37, 41), 2),
}
# Implementation, path, shape.
PATHS = [
    *(("reference", "", shape) for shape in ("small", "odd", "one value", "large")),
    *(
        ("cpu", "", shape)
        for shape in ("small", "odd", "one value", "one pixel", "vectors", "large")
    ),
    ("cuda-ptx", "sm_90", "odd"),
    ("cuda-ptx", "sm_90", "one value"),
    ("cuda-ptx", "sm_90", "vectors"),
    ("cuda-ptx", "sm_90", "cluster"),
    ("cuda-ptx", "sm_80", "split odd"),
    ("triton-ptx", "sm_90", "odd"),
    ("triton-ptx", "sm_90", "vectors"),
    ("triton-ptx", "sm_90", "cluster"),
    ("triton-ptx", "sm_80", "split odd"),
]
# What takes the emulator seconds in every layout and dtype.
SLOW = {"cuda-ptx", "triton-ptx"}
VALUES = (3.7, -1e4, 1e6, 1e-3, -0.1, 12345.678)
RATIOS = (0.0, 1.0, 30.0, 1e3, 1e4, 1e5, 1e6, 1e7)


def path_params() -> Iterator[object]:
    """All paths in both layouts; of the slow ones the default run has one layout each."""
    skips = {
        p.values[0]: p.marks for p in implementation_params(*dict.fromkeys(p[0] for p in PATHS))
    }
    for number, (implementation, path, shape) in enumerate(PATHS):
        for k, layout in enumerate(LAYOUTS):
            marks = list(skips[implementation])
            if implementation in SLOW and k != number % 2:
                marks.append(pytest.mark.slow)
            name = " ".join(filter(None, (implementation, path, shape, layout)))
            yield pytest.param(implementation, path, shape, layout, marks=marks, id=name)


every_path = pytest.mark.parametrize(
    ("implementation", "path", "shape", "layout"), [*path_params()]
)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads, so that they share the large groups."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def arguments(shape: str, x: Tensor, layout: str, activation: int = 0, **operands: Tensor) -> dict:
    """The raw operator's arguments: absent operands are None."""
    small = {name: operands.get(name) for name in OPERANDS}
    return {
        "x": x.contiguous(memory_format=LAYOUTS[layout]),
        "num_groups": SHAPES[shape][1],
        "weight": small["weight"],
        "bias": small["bias"],
        "eps": 1e-5,
        "channel_bias": small["channel_bias"],
        "scale": small["scale"],
        "shift": small["shift"],
        "activation": activation,
    }


def random_operands(shape: str, *names: str) -> dict[str, Tensor]:
    batch, channels = SHAPES[shape][0][:2]
    generator = torch.Generator().manual_seed(2)
    sizes = dict.fromkeys(OPERANDS, (batch, channels))
    sizes |= dict.fromkeys(("weight", "bias"), (channels,))
    return {name: torch.randn(sizes[name], generator=generator) for name in names}


def run(implementation: str, path: str, args: dict) -> dict[str, Tensor]:
    """y, mean, rstd and all gradients, by name."""
    names = ("x", *(name for name in OPERANDS if args[name] is not None))
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(args["x"].shape, generator=generator).to(args["x"].dtype)
    options = {"arch": path} if path.startswith("sm_") else {}
    result = evaluate(
        "group_norm_silu", implementation, args, gradients=names, grad_output=grad, **options
    )
    outputs = dict(zip(("y", "mean", "rstd"), result.outputs, strict=True))
    if path == "sm_80":
        assert len(result.launches) >= 6  # three of each pass: the split
    return outputs | {f"grad of {name}": result.gradients[name] for name in names}


def per_group(shape: str, values: tuple[float, ...]) -> Tensor:
    """One value for each group of each sample, in turn: (B, C, 1, 1) in float64."""
    (batch, channels, *_), groups = SHAPES[shape]
    cycled = torch.tensor(values, dtype=torch.float64)[torch.arange(batch * groups) % len(values)]
    return cycled.reshape(batch, groups).repeat_interleave(channels // groups, 1)[..., None, None]


DTYPES = ["fp32", pytest.param("bf16", marks=pytest.mark.slow)]


@every_path
@pytest.mark.parametrize("dtype", [*DTYPES, "fp64"])
def test_constant_groups_are_exact(
    implementation: str, path: str, shape: str, layout: str, dtype: str
) -> None:
    """Everything but the mean, gradients too, is bit for bit what groups of zeros have."""
    if dtype == "fp64" and implementation in SLOW:
        pytest.skip("float64 kernels exist on the CPU only")
    x = per_group(shape, VALUES).expand(SHAPES[shape][0]).to(FLOATS[dtype])
    for activation, names in ((0, ("weight", "bias", "scale", "shift")), (1, ("bias",)), (1, ())):
        small = random_operands(shape, *names)
        args = arguments(shape, x, layout, activation, **small)
        found = run(implementation, path, args)
        zeros = run(implementation, path, args | {"x": torch.zeros_like(args["x"])})
        means = x[:, :: x.shape[1] // args["num_groups"], 0, 0]
        assert torch.equal(found.pop("mean"), means.to(found["rstd"].dtype))
        for name, value in found.items():
            assert torch.equal(value, zeros[name]), name
        if activation == 1:
            expected = torch.zeros(x.shape[1]) if not names else small["bias"]
            assert torch.equal(found["y"], expected[:, None, None].to(x.dtype).expand_as(x))
        if implementation in SLOW:
            break  # one run of each pass is enough for the emulator
    if "weight" in found:
        assert not found["grad of weight"].any()


@every_path
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_groups_with_a_channel_bias_are_exact(
    implementation: str, path: str, shape: str, layout: str, dtype: str
) -> None:
    """A bias that is one for the channels of a group, small beside its value, or large."""
    x = per_group(shape, VALUES).expand(SHAPES[shape][0]).to(FLOATS[dtype])
    bias = random_operands(shape, "bias")
    added = per_group(shape, (0.3, 1e4, -1e-5, 77.7, 1e6))[..., 0, 0].float()
    args = arguments(shape, x, layout, 1, channel_bias=added, **bias)
    y, mean, _ = evaluate("group_norm_silu", implementation, args).outputs
    assert torch.equal(y, bias["bias"][:, None, None].to(x.dtype).expand_as(x))
    step = x.shape[1] // args["num_groups"]
    assert torch.equal(mean, x[:, ::step, 0, 0].float() + added[:, ::step])


def check_gradients_of_constant_groups(
    implementation: str, path: str, dtype: str, shape: str, layout: str
) -> None:
    """Of the rounded mean, value and bias, a backward pass finds the value again.

    The mean less the bias is off by a step of the bias, which is divided by sqrt(eps).
    """
    limit = 6e4 if dtype == "fp16" else 1e6
    x = per_group(shape, (3.7, -0.1, 12345.678, 1e-3, -limit)).expand(SHAPES[shape][0])
    added = per_group(shape, (0.3, limit, -1e-5, 77.7, 1.0))[..., 0, 0]
    small = random_operands(shape, "weight", "bias", "scale", "shift")
    for activation, names in ((0, ("weight", "bias", "scale", "shift")), (1, ())):
        operands = {name: small[name] for name in names} | {"channel_bias": added.float()}
        args = arguments(shape, x.to(FLOATS[dtype]), layout, activation, **operands)
        found = run(implementation, path, args)
        args["x"] = torch.zeros_like(args["x"])
        args["channel_bias"] = torch.zeros_like(args["channel_bias"])
        zeros = run(implementation, path, args)
        for name in found.keys() - {"mean"}:
            assert torch.equal(found[name], zeros[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["small", "odd", "one value", "one pixel", "vectors", "large"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("implementation", implementation_params("reference", "cpu"))
def test_gradients_of_constant_groups_with_a_channel_bias_are_exact(
    implementation: str, dtype: str, shape: str, layout: str
) -> None:
    check_gradients_of_constant_groups(implementation, "", dtype, shape, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path_shape", [(p, s) for i, p, s in PATHS if i == "cuda-ptx"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", implementation_params("cuda-ptx"))
def test_gradients_of_constant_groups_with_a_channel_bias_are_exact_on_cuda(
    implementation: str, dtype: str, path_shape: tuple[str, str], layout: str
) -> None:
    path, shape = path_shape
    check_gradients_of_constant_groups(implementation, path, dtype, shape, layout)


class Conditioned(Exact):
    """Bounds that take the condition number |mean| / deviation by itself.

    Of a group of N elements, the sums take N roundings, relative to the deviations, of random
    signs: operations(args). The mean is rounded once where it is stored, and where partial means
    are merged in pairs log2(N) times more, each relative to |mean|: h_hat is off by that times
    |mean| / deviation, and by as much again times |h_hat| through the variance.
    """

    def __init__(self, args: dict) -> None:
        super().__init__(args)
        a = self.args
        added = 0 if a["channel_bias"] is None else a["channel_bias"][..., None]
        h_hat = ((a["x"].flatten(2) + added - self.per_channel(self.mean)) * self.rstd_c).abs()
        elements = a["x"].shape[1:].numel() / a["num_groups"]
        roundings = 2 + math.log2(elements)
        condition = self.h_size - h_hat
        rest = self.z_size - self.gamma.abs() * self.h_size
        self.h_size = 1 + h_hat + condition * roundings / operations(args)
        self.z_size = self.gamma.abs() * self.h_size + rest


@every_path
@pytest.mark.parametrize(
    "operands", [OPERANDS, pytest.param((), marks=pytest.mark.slow)], ids=["all", "none"]
)
def test_errors_follow_the_condition(
    implementation: str, path: str, shape: str, layout: str, operands: tuple[str, ...]
) -> None:
    """Groups of deviation 1 with means up to 1e7, of both signs."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPES[shape][0], generator=generator, dtype=torch.float64)
    means = per_group(shape, tuple((-1) ** k * ratio for k, ratio in enumerate(RATIOS)))
    x = (means + noise).float()
    args = arguments(shape, x, layout, **random_operands(shape, *operands))
    found = run(implementation, path, args)
    exact = Conditioned(args)
    names = ("x", *operands)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    gradients = exact.backward(grad, names)
    expected = dict(zip(("mean", "rstd"), exact.statistics(), strict=True))
    expected |= {"y": exact.forward()} | {f"grad of {k}": v for k, v in gradients.items()}
    for name, (value, size) in expected.items():
        assert_close(
            found[name],
            value,
            magnitude=size,
            operations=(2 if name.startswith("grad") else 1) * operations(args),
        )


@every_path
def test_a_deviation_of_one_float32_step(
    implementation: str, path: str, shape: str, layout: str
) -> None:
    """Two neighbouring numbers near 1e6: their results are apart by a step times rstd.

    To some roundings of the results. All of them may be shifted alike by the rounding of the mean
    to float32, half a step; only where partial means are merged in float32, on GPUs, by more steps.
    """
    if shape.startswith("one"):
        pytest.skip("a group has one value, or one pixel")
    step = 2.0**-4
    base = per_group(shape, (1e6, -1e6, 1e6 + 17 * step, -999_990.0, 987_654.5))
    odd = torch.arange(math.prod(SHAPES[shape][0][1:])).reshape(SHAPES[shape][0][1:]) % 2
    x = (base + step * odd).float()
    assert torch.equal(x.double(), base + step * odd)
    y, _, rstd = evaluate(
        "group_norm_silu", implementation, arguments(shape, x, layout, activation=1)
    ).outputs
    groups = SHAPES[shape][1]
    size = x.shape[1] // groups
    values = y.double().unflatten(1, (groups, size))
    exact = x.double().unflatten(1, (groups, size))
    variance = exact.var((2, 3, 4), correction=0)
    true_rstd = (variance + 1e-5).rsqrt()
    shift = values.mean((2, 3, 4)).abs()
    gap = values.amax((2, 3, 4)) - values.amin((2, 3, 4))
    roundings = 8 * unit_roundoff(torch.float32) * (1 + values.abs().amax((2, 3, 4)))
    assert ((gap - step * rstd.double()).abs() <= roundings).all()
    merged = 2 + math.log2(exact[0, 0].numel()) if implementation.endswith("-ptx") else 1
    assert (shift <= merged * step / 2 * rstd.double() + roundings).all()
    if not implementation.endswith("-ptx"):
        sums = operations(arguments(shape, x, layout)) * unit_roundoff(torch.float32)
        assert ((rstd.double() - true_rstd).abs() <= sums * true_rstd).all()
