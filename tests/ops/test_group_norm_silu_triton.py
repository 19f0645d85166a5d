"""The Triton kernels of group_norm_silu: values, choice of kernels, traffic, determinism."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_harness import assert_close, available, evaluate, implementation_params
from op_harness.group_norm_silu import (
    OPERANDS,
    Case,
    Exact,
    arguments,
    grad_output,
    operations,
)
from op_harness.group_norm_triton import choose_kernels
from ptx_emulator.counters import Requests

pytest.importorskip("triton", reason="triton is not installed")

import triton

from fastdiff.triton_kernels import _launch
from fastdiff.triton_kernels import group_norm_silu_plan as plans

CASES = [
    *(
        Case(layout=layout, dtype=dtype)
        for layout, dtype in (
            ("contiguous", "bf16"),
            ("channels_last", "bf16"),
            ("channels_last", "fp32"),
        )
    ),
    Case(dtype="fp16", operand_dtype="bf16", chunked=True),
    Case(operand_dtype="fp64", operands=("weight", "bias"), activation="identity"),
    Case(shape="odd", operands=()),
    Case(shape="odd", layout="misaligned", dtype="fp16"),
    Case(shape="odd", layout="channels_last", values="constant", dtype="bf16"),
    Case(shape="odd", values="mean 1e4", operands=("weight", "bias", "channel_bias")),
    Case(shape="G = C", layout="channels_last"),
    Case(shape="G = 1"),
    Case(shape="HW = 1"),
    Case(shape="batch 0"),
    Case(shape="3-D"),
    Case(shape="5-D", layout="channels_last"),
    Case(shape="wide"),
]
SPLIT_CASES = [
    Case(layout="channels_last", dtype="bf16"),
    Case(shape="odd"),
    Case(shape="odd", layout="channels_last", values="mean 1e4", operands=("weight", "bias")),
    Case(shape="G = 1"),
    Case(shape="wide"),  # a program of the second stage takes a group's channels in two parts
    Case(shape="large group", layout="channels_last", dtype="bf16", operands=("scale", "shift")),
]

ptx = pytest.mark.skipif(
    available("triton-ptx") is not None, reason=f"triton-ptx: {available('triton-ptx')}"
)


@pytest.fixture(autouse=True)
def forgotten_plans() -> Iterator[None]:
    """Plans of changed constants are not remembered for other tests, nor theirs for these."""
    plans.plan.cache_clear()
    yield
    plans.plan.cache_clear()


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernels("split", monkeypatch)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernels("cluster", monkeypatch)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernels("pieces", monkeypatch)


def check(case: Case, implementation: str, **emulator: Any) -> list:
    """Outputs and gradients against float64; the launches."""
    args = arguments(case)
    names = ("x", *(name for name in OPERANDS if args[name] is not None))
    grad = grad_output(case, args["x"])
    result = evaluate(
        "group_norm_silu", implementation, args, gradients=names, grad_output=grad, **emulator
    )
    exact = Exact(args)
    results = dict(zip(("y", "mean", "rstd"), result.outputs, strict=True)) | result.gradients
    expected = dict(zip(("mean", "rstd"), exact.statistics(), strict=True))
    expected |= {"y": exact.forward()} | exact.backward(grad, names)
    for name, (value, size) in expected.items():
        actual = results[name]
        if actual.dtype == torch.float64:
            assert torch.equal(actual, actual.float().double())  # computed in float32
            actual = actual.float()
        assert_close(
            actual,
            value,
            magnitude=size,
            operations=(2 if name in names else 1) * operations(args),
            implementation=implementation,
        )
    return result.launches


@pytest.mark.parametrize(
    "implementation", implementation_params("triton-interpreted", "triton-ptx")
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, implementation: str) -> None:
    check(case, implementation)


@ptx
@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_split_values(case: Case) -> None:
    launches = check(case, "triton-ptx")
    assert len(launches) >= 6  # moments, merge, apply; sums, finish, apply


CLUSTER_CASES = [
    Case(dtype="bf16"),
    Case(layout="channels_last"),
    Case(shape="odd", layout="misaligned", dtype="fp16"),
    Case(layout="channels_last", values="constant", dtype="bf16"),
    Case(shape="odd", values="mean 1e4", operands=("weight", "bias", "channel_bias")),
    Case(shape="G = 1"),
    Case(shape="5-D", layout="channels_last"),
]


@ptx
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("case", CLUSTER_CASES, ids=str)
def test_cluster_values(case: Case) -> None:
    launches = check(case, "triton-ptx")
    assert any(launch.cluster for launch in launches)


PIECES_CASES = [
    Case(dtype="bf16", shape="1024 elements"),  # forward as values, backward in pairs
    Case(dtype="fp16", shape="1024 elements", values="mean 1e4", operands=("weight", "bias")),
    Case(dtype="bf16", shape="2048 elements"),  # forward in pairs, backward in two passes
    Case(dtype="bf16", shape="2048 elements", layout="channels_last"),
    Case(dtype="fp16", shape="2048 elements", layout="channels_last", values="std 1000"),
    Case(dtype="bf16", shape="1024 elements", layout="misaligned"),  # no pairs
    Case(),  # both as values
    Case(layout="channels_last"),
]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    "implementation", implementation_params("triton-interpreted", "triton-ptx")
)
@pytest.mark.parametrize("case", PIECES_CASES, ids=str)
def test_values_in_pieces(case: Case, implementation: str) -> None:
    check(case, implementation)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("channels_last", [False, True])
def test_pairs_where_values_do_not_fit(channels_last: bool) -> None:
    def plan(channels: int, pixels: int, itemsize: int, **options: Any) -> plans.Plan:
        return plans.plan(channels, 1, pixels, itemsize, channels_last, **options)

    for itemsize, packed in ((2, True), (4, False)):
        forward = plan(32, 64, itemsize, arrays=1)
        assert (forward.one_pass, forward.packed) == (packed, packed)
    assert not plan(16, 64, 2, arrays=1).packed
    assert not plan(32, 64, 2, arrays=1, pairs=False).one_pass
    # Pairs are neighbours in memory, and belong to one group.
    assert plan(32, 63, 2, arrays=1).packed == channels_last
    assert plan(31, 64, 2, arrays=1).packed == (not channels_last)
    # The coefficients of 8 channels a thread leave no room for what backward would hold.
    assert plan(16, 64, 2, arrays=2).packed == (not channels_last)


@ptx
@pytest.mark.usefixtures("cluster")
def test_no_clusters_on_sm_80() -> None:
    launches = check(Case(), "triton-ptx", arch="sm_80")
    assert len(launches) >= 5  # forward; sums, finish, apply, weights
    assert not any(launch.cluster for launch in launches)


def random_arguments(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> dict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    last = torch.channels_last if channels_last else torch.contiguous_format
    weight, bias = torch.randn(2, shape[1], generator=generator)
    return {
        "x": x.contiguous(memory_format=last),
        "num_groups": 32,
        "weight": weight,
        "bias": bias,
        "eps": 1e-6,
        "channel_bias": torch.randn(shape[:2], generator=generator),
        "scale": None,
        "shift": None,
        "activation": 0,
    }


NAMES = ("x", "weight", "bias", "channel_bias")


@ptx
@pytest.mark.parametrize(
    ("layout", "kernels"),
    [("contiguous", "one pass"), ("channels_last", "split"), ("channels_last", "cluster")],
)
def test_a_sample_does_not_depend_on_the_batch(
    layout: str, kernels: str, request: pytest.FixtureRequest
) -> None:
    if kernels != "one pass":
        request.getfixturevalue(kernels)
    args = random_arguments((3, 64, 8, 8), torch.bfloat16, layout == "channels_last")
    grad = torch.randn_like(args["x"])
    options = {"gradients": NAMES, "grad_output": grad}
    batch = evaluate("group_norm_silu", "triton-ptx", args, **options)
    assert any(launch.cluster for launch in batch.launches) == (kernels == "cluster")
    # Another order of blocks and threads: the same bits.
    again = evaluate("group_norm_silu", "triton-ptx", args, **options, seed=1)
    for name in NAMES:
        assert torch.equal(batch.gradients[name], again.gradients[name])
    alone = args | {name: args[name][1:2] for name in ("x", "channel_bias")}
    options["grad_output"] = grad[1:2]
    sample = evaluate("group_norm_silu", "triton-ptx", alone, **options)
    for one, many in zip(sample.outputs, batch.outputs, strict=True):
        assert torch.equal(one, many[1:2])
    for name in ("x", "channel_bias"):
        assert torch.equal(sample.gradients[name], batch.gradients[name][1:2])


@ptx
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [4, 12])
def test_samples_of_small_maps_share_a_program(batch: int, layout: str) -> None:
    """One launch if a program has the whole batch, and for each sample the same bits as alone."""
    args = random_arguments((batch, 64, 4, 4), torch.bfloat16, layout == "channels_last")
    grad = torch.randn_like(args["x"])
    results = []
    for samples in (slice(0, batch), slice(3, 4)):
        part = args | {name: args[name][samples] for name in ("x", "channel_bias")}
        options = {"gradients": NAMES, "grad_output": grad[samples]}
        results.append(evaluate("group_norm_silu", "triton-ptx", part, **options))
    many, alone = results
    assert len(many.launches) - many.forward_launches == (1 if batch == 4 else 2)
    for name in ("x", "channel_bias"):
        assert torch.equal(many.gradients[name][3:4], alone.gradients[name])
    exact = Exact(args).backward(grad, NAMES)
    for name in ("weight", "bias"):
        value, size = exact[name]
        assert_close(many.gradients[name], value, magnitude=size, operations=2 * operations(args))


@ptx
@pytest.mark.parametrize(
    ("layout", "kernels"),
    [("contiguous", "one pass"), ("channels_last", "split"), ("contiguous", "cluster")],
)
def test_constant_groups_with_a_channel_bias_have_exact_gradients(
    layout: str, kernels: str, request: pytest.FixtureRequest
) -> None:
    """Bit for bit those of zeros: of the rounded mean, value and bias, the value is found again.

    The mean less the bias is off by a step of the bias, which is divided by sqrt(eps).
    """
    if kernels != "one pass":
        request.getfixturevalue(kernels)
    args = random_arguments((2, 96, 7, 8), torch.float32, layout == "channels_last")
    grad = torch.randn_like(args["x"])
    cycled = torch.arange(64).reshape(2, 32) % 5
    value, added = (
        torch.tensor(values)[cycled].repeat_interleave(3, dim=1)
        for values in ((3.7, -0.1, 12345.678, 1e-3, -1e6), (0.3, 1e6, -1e-5, 77.7, 1.0))
    )
    options = {"gradients": NAMES, "grad_output": grad}
    x = torch.zeros_like(args["x"])
    zeros = args | {"x": x, "channel_bias": torch.zeros(2, 96)}
    constant = args | {"x": x + value[..., None, None], "channel_bias": added}
    expected, found = (
        evaluate("group_norm_silu", "triton-ptx", a, **options) for a in (zeros, constant)
    )
    assert torch.equal(found.outputs[0], expected.outputs[0])
    for name in NAMES:
        assert torch.equal(found.gradients[name], expected.gradients[name]), name


SITES = [
    ((1, 128, 32, 32), "bf16", "channels_last", "sm_90"),
    ((1, 256, 16, 16), "fp32", "contiguous", "sm_90"),
    ((1, 128, 64, 64), "bf16", "channels_last", "sm_90"),  # clusters
    ((1, 128, 64, 64), "bf16", "channels_last", "sm_80"),  # split
    ((1, 256, 4, 4), "bf16", "contiguous", "sm_90"),  # two groups, as one has 8 bytes a thread
    ((16, 512, 4, 4), "bf16", "contiguous", "sm_90"),  # four samples to a program
    ((16, 256, 4, 4), "fp32", "channels_last", "sm_90"),  # two
]
# ddpm_cifar10's, and of ddpm_256 and a latent VAE what the emulator does in minutes.
SLOW_SITES = [
    ((batch, *shape), dtype, layout, arch)
    for batch, shapes in (
        (1, [(128, 32, 32), (256, 32, 32), (384, 32, 32), (128, 16, 16), (256, 16, 16)]),
        (1, [(384, 16, 16), (512, 16, 16), (256, 8, 8), (512, 8, 8), (256, 4, 4), (512, 4, 4)]),
        (16, [(128, 32, 32), (256, 8, 8)]),
        (1, [(128, 256, 256), (256, 128, 128), (512, 16, 16), (1024, 8, 8), (512, 64, 64)]),
    )
    for shape in shapes
    for dtype in ("fp32", "bf16")
    for layout in ("contiguous", "channels_last")
    for arch in ("sm_80", "sm_90")
]


@ptx
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "arch"),
    [*SITES, *(pytest.param(*site, marks=pytest.mark.slow) for site in SLOW_SITES)],
    ids=str,
)
def test_traffic(shape: tuple[int, ...], dtype: str, layout: str, arch: str) -> None:
    """Tensor-sized accesses, 16 bytes each, of whole sectors; blocks that fill a GPU."""
    element = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    args = random_arguments(shape, element, layout == "channels_last")
    x = args["x"]
    size = x.numel() * x.element_size()
    small = sum(args[name].numel() * args[name].element_size() for name in NAMES[1:])
    statistics = 2 * 4 * shape[0] * 32
    options = {"arch": arch, "count": True, "racecheck": False}
    forward = evaluate("group_norm_silu", "triton-ptx", args, **options)
    grad = torch.randn_like(x)
    both = evaluate(
        "group_norm_silu", "triton-ptx", args, gradients=NAMES, grad_output=grad, **options
    )
    backward = both.launches[len(forward.launches) :]
    pixels = x[0, 0].numel()
    for launches, arrays, (held, split_accesses), extra in (
        (forward.launches, 1, (2, 3), small + statistics),
        (backward, 2, (3, 5), 2 * small + statistics),
    ):
        channels_last = layout == "channels_last"
        clusters = arch == "sm_90" and _launch.compiles_clusters(triton.__version__)
        max_blocks = _launch.CLUSTER_BLOCKS if clusters else 1
        sizes = shape[1], 32, pixels, x.element_size()
        plan = plans.plan(*sizes, channels_last, arrays, max_blocks)
        touched = [array for launch in launches for array in launch.counters.arrays]
        large = [array for array in touched if array.size >= size]
        moved = sum(array.load_requests.bytes + array.stored_bytes for array in large)
        # Every thread reads the small operands it needs; the caches serve all but the first.
        moved += sum(
            array.unique_loaded_bytes + array.unique_stored_bytes
            for array in touched
            if array.size < size
        )
        bound = (held if plan.one_pass else split_accesses) * size
        assert moved <= 1.05 * (bound + extra)
        requests = sum((a.load_requests + a.store_requests for a in large), Requests())
        # But for the first element of each group, which a thread reads by itself: forward once for
        # each of the two layouts that the compiler needs it in, else for each of its channels.
        narrow = sum(number for width, number in requests.widths.items() if width != 16)
        first = sum(launch.blocks * math.prod(launch.block) for launch in launches)
        assert narrow <= 2 * max(plan.groups, 8) * first
        # One or two groups of 12 channels in channels_last begin in the middle of a sector.
        width = plan.groups * shape[1] // 32 * x.element_size()
        waste = 1.4 if channels_last and width % plans.SECTOR_BYTES else 1.1
        assert requests.sectors <= waste * requests.min_sectors
        if plan.blocks > 1:
            assert all(launch.cluster == (plan.blocks, 1, 1) for launch in launches[:1])
        blocks = plan.channel_tiles(shape[1], 32) * shape[0]
        if not plan.one_pass:
            blocks *= -(-pixels // (plan.pixels * plan.rounds))
            assert blocks >= 128


@pytest.mark.parametrize(
    ("batch", "pixels", "itemsize", "samples"),
    [
        (16, 16, 2, 4),
        (128, 16, 4, 2),
        (128, 1, 2, 4),
        (6, 16, 2, 2),
        (7, 16, 2, 1),
        (128, 64, 2, 1),
    ],
)
def test_samples_per_program(batch: int, pixels: int, itemsize: int, samples: int) -> None:
    cut = plans.plan(512, 32, pixels, itemsize, pixels == 1, arrays=2)
    assert plans.samples_per_program(cut, batch, 512, 32, pixels, itemsize) == samples


def plan(shape: tuple[int, int, int], itemsize: int, layout: str, arrays: int) -> tuple:
    channels, groups, pixels = shape
    chosen = plans.plan(channels, groups, pixels, itemsize, layout == "channels_last", arrays)
    return chosen[:5]


@pytest.mark.parametrize(
    ("shape", "itemsize", "layout", "arrays", "expected"),
    [
        ((128, 32, 1024), 2, "contiguous", 1, (True, 1, 4, 1024, 1)),
        # 4 groups of 4 channels fill a sector of 16 bfloat16, 2 one of 8 float32.
        ((128, 32, 1024), 2, "channels_last", 1, (True, 4, 16, 1024, 1)),
        ((128, 32, 1024), 4, "channels_last", 1, (True, 2, 8, 1024, 1)),
        # Four groups of 12 are three sectors, and fit in pairs; two, 1.5 sectors, are better than
        # three accesses.
        ((384, 32, 1024), 2, "channels_last", 1, (True, 4, 64, 1024, 1)),
        ((384, 32, 1024), 4, "channels_last", 1, (True, 2, 32, 1024, 1)),
        ((384, 32, 1024), 2, "channels_last", 2, (False, 4, 64, 64, 1)),
        # 65536 elements a group fit in pairs.
        ((512, 32, 4096), 2, "contiguous", 1, (True, 1, 16, 4096, 1)),
        ((512, 32, 4096), 4, "contiguous", 1, (False, 1, 1, 4096, 1)),
        # At most 512 programs a sample add up several tiles each.
        ((128, 32, 262144), 2, "contiguous", 1, (False, 1, 1, 4096, 16)),
        ((128, 32, 65536), 2, "channels_last", 1, (False, 8, 32, 128, 4)),
        # A group of all channels is cut.
        ((1024, 1, 256), 4, "contiguous", 1, (False, 1, 16, 256, 1)),
        ((7, 7, 1), 4, "channels_last", 1, (True, 7, 8, 1, 1)),
        # A group of 8 x 4 x 4 bfloat16 has 8 bytes for each thread of a warp, two have 16.
        ((256, 32, 16), 2, "contiguous", 1, (True, 2, 16, 16, 1)),
        ((256, 32, 16), 4, "contiguous", 1, (True, 1, 8, 16, 1)),
    ],
)
def test_plan(shape, itemsize, layout, arrays, expected) -> None:
    """One pass or two, groups in a span, channels and pixels of a tile, tiles in a reduction."""
    assert plan(shape, itemsize, layout, arrays) == expected


def test_which_triton_compiles_clusters() -> None:
    """Tried: 3.5.1, 3.6.0 and 3.7.0 fail in the middle of the compiler."""
    assert [_launch.compiles_clusters(v) for v in ("3.7.1", "3.8.0", "3.10.0+git1", "4.0.0")] == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("shape", "itemsize", "layout", "arrays", "expected"),
    [
        # A group of 4 x 256 x 256 in registers of eight blocks; with its gradient only in pairs.
        ((128, 32, 65536), 2, "contiguous", 1, (True, 1, 4, 8192, 8)),
        ((128, 32, 65536), 2, "contiguous", 2, (True, 1, 4, 8192, 8)),
        ((128, 32, 65536), 4, "contiguous", 2, (False, 1, 1, 4096, 1)),
        # Two blocks would do: four fill a device at batch 1.
        ((512, 32, 4096), 2, "contiguous", 1, (True, 1, 16, 1024, 4)),
        ((512, 32, 4096), 4, "contiguous", 2, (True, 1, 16, 1024, 4)),
        ((512, 32, 4096), 4, "channels_last", 2, (True, 1, 16, 512, 8)),
        ((128, 32, 4096), 2, "channels_last", 1, (True, 4, 16, 512, 8)),
        # Four groups of 12 fill three sectors: one block would hold two, and waste a quarter.
        ((384, 32, 1024), 2, "channels_last", 1, (True, 4, 64, 128, 8)),
        # What one block holds stays there; rows of less than a sector are not cut.
        ((128, 32, 1024), 2, "contiguous", 1, (True, 1, 4, 1024, 1)),
        ((65536, 1, 1), 2, "channels_last", 1, (False, 1, 256, 1, 1)),
    ],
)
def test_plan_with_clusters(shape, itemsize, layout, arrays, expected) -> None:
    """One pass or two, groups in a span, channels and pixels of a block's tile, blocks."""
    channels, groups, pixels = shape
    chosen = plans.plan(channels, groups, pixels, itemsize, layout == "channels_last", arrays, 8)
    assert (*chosen[:4], chosen.blocks) == expected


@ptx
def test_a_plan_is_searched_for_once() -> None:
    """The search takes longer than all else that a call does on the host."""
    for _ in range(3):
        check(Case(shape="wide"), "triton-ptx")
    found = plans.plan.cache_info()
    assert found.misses == 2  # forward and backward
    assert found.hits == 4
