"""The Triton kernels of group_norm_silu with dropout, and of residual_group_norm_silu."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from op_harness import assert_close, available, evaluate, implementation_params
from op_harness.group_norm_silu import Case, Exact, arguments, grad_output, operations
from op_harness.group_norm_triton import choose_kernels
from op_harness.traffic import moved_bytes
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.audit import triton_aot
from fastdiff.reference.dropout import Dropout, dropout_mask
from fastdiff.reference.group_norm_silu import ACTIVATIONS
from fastdiff.triton_kernels import group_norm_silu_plan as plans

ptx = pytest.mark.skipif(
    available("triton-ptx") is not None, reason=f"triton-ptx: {available('triton-ptx')}"
)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STREAM = 3 + (1 << 40)

# Kernels, case. Interpreted all but the clusters run, compiled all.
CASES = [
    ("one pass", Case(dtype="bf16")),
    ("one pass", Case(layout="channels_last", dtype="fp16", operand_dtype="bf16", chunked=True)),
    ("one pass", Case(shape="odd", layout="misaligned", operands=(), activation="identity")),
    ("one pass", Case(shape="G = 1", layout="channels_last")),  # 10 channels: no fours
    ("one pass", Case(shape="HW = 1")),
    ("one pass", Case(shape="batch 0")),
    ("split", Case(shape="odd", layout="channels_last", dtype="bf16")),
    ("split", Case(shape="wide")),  # rows of a group are cut
    ("cluster", Case(dtype="bf16")),
    ("cluster", Case(shape="odd", layout="channels_last", dtype="bf16")),  # in pairs
    ("pieces", Case(dtype="bf16", shape="1024 elements")),  # backward in pairs
    ("pieces", Case(dtype="fp16", shape="2048 elements", layout="channels_last")),  # forward
]
# What takes a minute in the emulator, as it compiles kernels of its own, and is like another.
SLOW = {1, 2, 4, 7}
PARAMS = [
    pytest.param(
        kernels,
        case,
        *param.values,
        marks=[*param.marks]
        + [pytest.mark.slow] * (param.values == ("triton-ptx",) and number in SLOW),
        id=f"{kernels}, {case}, {param.values[0]}",
    )
    for number, (kernels, case) in enumerate(CASES)
    for param in implementation_params("triton-interpreted", "triton-ptx")
    if (kernels, *param.values) != ("cluster", "triton-interpreted")
]


@pytest.fixture(autouse=True)
def forgotten_plans() -> Iterator[None]:
    """Plans of changed constants are not remembered for other tests."""
    yield
    plans.plan.cache_clear()


def check(found: dict[str, Tensor], expected: dict, args: dict, implementation: str) -> None:
    for name, (value, size) in expected.items():
        assert_close(
            found[name],
            value,
            magnitude=size,
            operations=2 * operations(args) + 1,
            implementation=implementation,
        )


@pytest.mark.parametrize(("kernels", "case", "implementation"), PARAMS)
def test_dropout(
    kernels: str, case: Case, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's mask bit for bit, and values and gradients under it."""
    choose_kernels(kernels, monkeypatch)
    args = arguments(case)
    x = args["x"]
    keys = torch.randint(-(2**63), 2**63 - 1, x.shape[:1], dtype=torch.int64)
    dropout = Dropout(77, *((keys, None) if case.activation == "silu" else (None, 5)), STREAM)
    names = ("x", *(name for name in case.operands))
    grad = grad_output(case, x)
    result = evaluate(
        "group_norm_silu_dropout",
        implementation,
        args | dropout._asdict(),
        gradients=names,
        grad_output=grad,
    )
    kept = dropout_mask(x, dropout)
    assert torch.equal(result.outputs[0] != 0, kept)
    factor = kept * dropout.scale
    exact = Exact(args)
    y, size = exact.forward()
    expected = {"y": (y * factor, size * factor)} | exact.backward(grad.double() * factor, names)
    check({"y": result.outputs[0]} | result.gradients, expected, args, implementation)


def residual_arguments(args: dict) -> dict:
    """Of the raw operator, from those of group_norm_silu."""
    x = args["x"]
    generator = torch.Generator().manual_seed(3)
    order = ("x", "residual", "num_groups", "weight", "bias", "eps", "scale", "shift", "activation")
    residual = torch.randn(x.shape, generator=generator).to(x.dtype)
    sum_bias = None
    if args["weight"] is not None:
        sum_bias = torch.randn(x.shape[1], generator=generator).to(args["weight"].dtype)
    given = args | {"residual": residual}
    return {name: given[name] for name in order} | {"sum_bias": sum_bias}


@pytest.mark.parametrize(("kernels", "case", "implementation"), PARAMS)
def test_residual(
    kernels: str, case: Case, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum bit for bit, and values and gradients of it."""
    choose_kernels(kernels, monkeypatch)
    given = residual_arguments(arguments(case))
    x = given["x"]
    operands = ("weight", "bias", "scale", "shift", "sum_bias")
    names = ("x", "residual", *(name for name in operands if given[name] is not None))
    grads = grad_output(case, x).flip(1), grad_output(case, x)
    result = evaluate(
        "residual_group_norm_silu", implementation, given, gradients=names, grad_output=grads
    )
    summed, y, *_ = result.outputs
    exact_sum = x.float() + given["residual"].float()
    if given["sum_bias"] is not None:
        exact_sum += given["sum_bias"].float().reshape(-1, *[1] * (x.dim() - 2))
    if (implementation, x.dtype) != ("triton-interpreted", torch.bfloat16):  # it truncates
        assert torch.equal(summed, exact_sum.to(x.dtype))
    assert torch.equal(result.gradients["x"], result.gradients["residual"])

    args = arguments(case) | {"x": summed, "channel_bias": None}
    exact = Exact(args)
    small = tuple(name for name in names if name in ("weight", "bias", "scale", "shift"))
    expected = {"y": exact.forward()} | exact.backward(grads[1], ("x", *small))
    value, size = expected["x"]
    expected["x"] = value + grads[0].double(), size + grads[0].double().abs()
    if "sum_bias" in names:
        expected["sum_bias"] = tuple(t.flatten(2).sum((0, 2)) for t in expected["x"])
    check({"y": y} | result.gradients, expected, args, implementation)


@ptx
@pytest.mark.parametrize("kernels", ["one pass", "split"])
def test_the_gradient_of_a_sum_bias_is_deterministic(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits in another order of blocks and threads."""
    choose_kernels(kernels, monkeypatch)
    case = Case(layout="channels_last", dtype="bf16")
    given = residual_arguments(arguments(case))
    grad = grad_output(case, given["x"])
    runs = [
        evaluate(
            "residual_group_norm_silu", "triton-ptx", given,
            gradients=("x", "sum_bias"), grad_output=(grad, grad), seed=seed,
        ).gradients
        for seed in (None, 1)
    ]  # fmt: skip
    for name in ("x", "sum_bias"):
        assert torch.equal(runs[0][name], runs[1][name])


@ptx
@pytest.mark.parametrize(
    ("shape", "layout", "arch", "accesses"),
    [
        # x, residual, sum, y; sum, grad, grad of sum, dx. Dropout moves nothing.
        ((1, 128, 16, 16), "contiguous", "sm_90", {"residual": (4, 4), "dropout": (2, 3)}),
        # The sum once more; it and its gradient twice.
        pytest.param(
            *((1, 128, 64, 64), "channels_last", "sm_80"),
            {"residual": (5, 6), "dropout": (3, 5)},
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("form", ["residual", "dropout"])
def test_traffic(shape: tuple[int, ...], layout: str, arch: str, accesses: dict, form: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def tensor() -> Tensor:
        x = torch.randn(shape, generator=generator).to(torch.bfloat16)
        return x.contiguous(memory_format=FORMATS[layout])

    x, other = tensor(), tensor()
    grad, grad_sum = tensor(), tensor()
    weight, bias, sum_bias = torch.randn(3, shape[1], generator=generator)
    args = {"x": x, "num_groups": 32, "weight": weight, "bias": bias, "eps": 1e-5}
    if form == "residual":
        op, names, grads = "residual_group_norm_silu", ("x", "sum_bias"), (grad_sum, grad)
        args = {"x": x, "residual": other} | args
        args |= {"scale": None, "shift": None, "activation": 0, "sum_bias": sum_bias}
    else:
        op, names, grads = "group_norm_silu_dropout", ("x",), grad
        args |= {"channel_bias": None, "scale": None, "shift": None, "activation": 0}
        args |= Dropout(26, None, 1, 0)._asdict()
    result = evaluate(
        op, "triton-ptx", args, gradients=(*names, "weight", "bias"), grad_output=grads,
        arch=arch, count=True, racecheck=False,
    )  # fmt: skip
    passes = result.launches[: result.forward_launches], result.launches[result.forward_launches :]
    small = 4 * (3 * 2 * shape[1] + 2 * 32)
    for launches, number in zip(passes, accesses[form], strict=True):
        assert moved_bytes(launches, x.nbytes) <= 1.05 * (number * x.nbytes + small)


def test_clusters_hold_pairs_only_without_a_form() -> None:
    """Their kernels would be more than Triton's pass that plans clusters takes."""
    sizes = 128, 32, 65536, 2, False
    assert plans.plan(*sizes, arrays=2, max_blocks=8).packed
    assert not plans.plan(*sizes, arrays=2, max_blocks=8, plain=False).one_pass
    assert plans.plan(512, 32, 4096, 2, False, arrays=2, max_blocks=8, plain=False).blocks > 1


@ptx
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((1, 128, 32, 32), 1 / 12), ((1, 128, 256, 256), 1 / 4), ((1, 96, 16, 16), 1 / 4)],
)
def test_philox_blocks_per_element(shape: tuple[int, ...], blocks: float, layout: str) -> None:
    """A sixteenth where a tile has four channels of a block (the 96 have groups of three)."""
    from fastdiff.triton_kernels import group_norm_silu as kernels

    empty = functools.partial(torch.empty, device="meta")
    x = empty(shape, dtype=torch.bfloat16).to(memory_format=FORMATS[layout])
    statistics = empty((1, 32))
    with triton_aot.recorded_launches() as launches:
        kernels.group_norm_silu(
            x, statistics, statistics, x, 32, None, None, 1e-5, None, None, None,
            ACTIVATIONS.index("silu"), layout == "channels_last",
            dropout=Dropout(26, None, 1, 0),
        )  # fmt: skip
    options = launches[-1].options
    tiling = options["TILING"]
    code = triton_aot.compile_launch(launches[-1], "sm_80").asm["ptx"]
    products = code.count("mul.hi.u32") + code.count("mul.wide.u32")
    elements = tiling.tile_channels * tiling.tile_pixels / (32 * options["num_warps"])
    assert 0 < products / 20 <= blocks * elements + 0.1 * elements / 4  # and a few for indices
