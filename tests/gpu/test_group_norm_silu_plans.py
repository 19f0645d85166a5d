"""group_norm_silu by plan: a case for each way that the kernels divide a tensor on this device.

Shapes are searched for: the smallest for which the plan function, asked with the limits of this
device, chooses what a case is about. That the kernels of this plan ran, and in these blocks, is
then seen on the device.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu.launches import Launch, recorded
from gpu.needs import GPU, two_devices
from gpu.software import on_software_device
from op_harness import assert_close, available, evaluate
from op_harness.group_norm_plan import Device, Plan, device_limits, plan
from op_harness.group_norm_silu import (
    OPERANDS,
    SHAPES,
    Case,
    Exact,
    arguments,
    grad_output,
    operations,
)

import fastdiff

pytestmark = GPU

# (dtype, whether accesses have 16 bytes, what the plan is)
KINDS: dict[str, tuple[str, bool, Callable[[Plan], Any]]] = {
    "one block": ("bf16", True, lambda p: p.one_pass and p.cluster == 1),
    "more than 48 KB": ("bf16", True, lambda p: p.one_pass and p.cluster == 1 and p.kib > 48),
    "more than 99 KB": ("bf16", True, lambda p: p.one_pass and p.cluster == 1 and p.kib > 99),
    "cluster 2": ("bf16", True, lambda p: p.cluster == 2),
    "cluster 4": ("fp32", True, lambda p: p.cluster == 4),
    "cluster 8": ("fp16", True, lambda p: p.cluster == 8),
    "cluster 16": ("bf16", True, lambda p: p.cluster == 16),
    "cluster of more than 99 KB": ("fp32", True, lambda p: p.cluster > 1 and p.kib > 99),
    "split": ("fp32", True, lambda p: not p.one_pass),
    "split, many chunks": ("bf16", True, lambda p: not p.one_pass and p.chunks > 1),
    "samples side by side": ("bf16", True, lambda p: p.samples > 1),
    "scalar access": ("bf16", False, lambda p: p.one_pass and p.cluster == 1),
    "scalar access, cluster": ("fp32", False, lambda p: p.cluster > 1),
    "scalar access, split": ("fp32", False, lambda p: not p.one_pass),
}
# Only the backward pass has something that samples side by side share.
LONG = ("split, many chunks", "scalar access, split")  # a million elements
PASSES = [
    pytest.param(kind, which, marks=[pytest.mark.slow] if kind in LONG else [])
    for kind in KINDS
    for which in ("forward", "backward")
    if (kind, which) != ("samples side by side", "forward")
]
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


def shapes() -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """((B, C, H, W), groups), smaller ones first; of one group only where two would take long."""
    sides = [(3, 3), (4, 4), (6, 6), (7, 5), (8, 8), (16, 16), (33, 31), (32, 32), (64, 64)]
    sides += [(127, 129), (128, 128), (256, 256), (512, 256), (512, 512)]
    group_channels = [1, 3, 4, 8, 16, 32, 128, 512, 1024, 1536, 2048]
    found = itertools.product((1, 2, 4, 12), (1, 2, 4, 8), group_channels, sides)
    every = [((b, g * c, *side), g) for b, g, c, side in found]
    every = [s for s in every if s[1] > 1 or torch.Size(s[0]).numel() >= 2**18]
    every = [s for s in every if torch.Size(s[0]).numel() >= 1000]
    return iter(sorted(every, key=lambda s: (torch.Size(s[0]).numel(), s[0])))


@functools.cache
def find(kind: str, layout: str, which: str) -> tuple[tuple[int, ...], int] | None:
    """The smallest shape and its number of groups whose plan on this device is of that kind."""
    dtype, vector, wanted = KINDS[kind]
    limits = device_limits(torch.cuda.get_device_properties())
    for shape, groups in shapes():
        channels, pixels = shape[1], shape[2] * shape[3]
        inner = channels if layout == "channels_last" or pixels == 1 else pixels
        if (inner % (16 // SIZES[dtype]) == 0) != vector:
            continue
        if wanted(planned(shape, groups, dtype, layout, which, limits)):
            return shape, groups
    return None


def skip_where_impossible(kind: str, limits: Device) -> None:
    if "cluster" in kind and limits.max_cluster == 1:
        pytest.skip("this device has no clusters")
    if kind == "cluster 16" and limits.max_cluster < 16:
        pytest.skip("this device has no clusters of 16")
    if "99 KB" in kind and limits.shared_bytes <= 99 << 10:
        pytest.skip("this device has no blocks with more than 99 KB of shared memory")


class Planned(Plan):
    """A plan with the kilobytes of a block's dynamic shared memory."""

    @property
    def kib(self) -> float:
        return self.samples * self.shared_bytes / 1024


def planned(shape, groups, dtype, layout, which, limits=None) -> Planned:
    batch, channels, *spatial = shape
    pixels, size = torch.Size(spatial).numel(), SIZES[dtype]
    last = layout == "channels_last"
    inner = channels if last or pixels == 1 else pixels
    return Planned(
        **vars(
            plan(
                (batch, channels, pixels),
                groups,
                size,
                device=limits or device_limits(torch.cuda.get_device_properties()),
                last=last,
                backward=which == "backward",
                vector=inner % (16 // size) == 0,
            )
        )
    )


def expected_launches(p: Planned, batch: int, which: str) -> list[Launch]:
    """What the plan says about the launches of one pass; None: nothing."""
    blocks = batch // p.samples * p.blocks_per_sample
    if p.one_pass:
        name = "fwd_kernel" if which == "forward" else "bwd_kernel"
        bytes_ = p.samples * p.shared_bytes
        found = [Launch(name, blocks, p.samples * p.threads, p.cluster, bytes_)]
    else:
        names = {
            "forward": ("moments_kernel", "statistics_kernel", "apply_kernel"),
            "backward": ("bwd_sums_kernel", "bwd_means_kernel", "bwd_apply_kernel"),
        }[which]
        found = [Launch(name, blocks, p.threads, 1, None) for name in names]
    if which == "backward" and batch > p.samples:
        found.append(Launch("bwd_parameters_kernel", 0, 0, 1, None))
    return found


def assert_launched(seen: list[Launch], expected: list[Launch]) -> None:
    assert len(seen) == len(expected), seen
    for launch, wanted in zip(seen, expected, strict=True):
        assert f"group_norm_silu_{wanted.name}" in launch.name
        if "statistics" in wanted.name or "means" in wanted.name or wanted.blocks == 0:
            continue  # by groups or channels
        assert (launch.blocks, launch.threads) == (wanted.blocks, wanted.threads), launch
        if launch.cluster is not None:
            assert launch.cluster == wanted.cluster, launch
        if None not in (launch.shared_bytes, wanted.shared_bytes):
            assert launch.shared_bytes == wanted.shared_bytes, launch


def check(case: Case, implementation: str) -> None:
    """Both passes against float64."""
    args = arguments(case)
    names = ("x", *(name for name in OPERANDS if args[name] is not None))
    grad = grad_output(case, args["x"])
    if case.layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    result = evaluate("group_norm_silu", implementation, args, gradients=names, grad_output=grad)
    exact = Exact(args)
    expected = exact.backward(grad, names) | {"y": exact.forward()}
    actual = result.gradients | {"y": result.outputs[0]}
    for name, (value, size) in expected.items():
        rounds = operations(args) * (1 if name == "y" else 2)
        assert_close(actual[name], value, magnitude=size, operations=rounds)


@pytest.mark.skipif(available("cuda") is not None, reason=f"cuda: {available('cuda')}")
@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("kind", "which"), PASSES)
def test_cuda(kind: str, layout: str, which: str, backend: str, monkeypatch) -> None:
    skip_where_impossible(kind, device_limits(torch.cuda.get_device_properties()))
    found = find(kind, layout, which)
    assert found is not None, f"no shape has the plan {kind!r}"
    shape, groups = found
    dtype = KINDS[kind][0]
    monkeypatch.setitem(SHAPES, kind, found)
    with recorded("group_norm_silu") as launches:
        check(Case(shape=kind, layout=layout, dtype=dtype), backend)
    of_passes = (planned(shape, groups, dtype, layout, name) for name in ("forward", "backward"))
    forward, backward = of_passes
    expected = expected_launches(forward, shape[0], "forward")
    expected += expected_launches(backward, shape[0], "backward")
    print(f"{shape}, {groups} groups, {layout}: {[launch.name for launch in launches]}")
    assert_launched(launches, expected)


TRITON_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "one block": ("bf16", lambda p: p.one_pass and p.blocks == 1 and not p.packed),
    "in pieces": ("fp32", lambda p: p.one_pass and p.blocks == 1 and p.pieces > 1),
    "in pairs": ("bf16", lambda p: p.packed and p.blocks == 1),
    "cluster": ("fp32", lambda p: p.one_pass and p.blocks > 1),
    "split": ("fp32", lambda p: not p.one_pass),
}
QUICK_KINDS = ("one block", "cluster")


def triton_plan(shape: tuple[int, ...], groups: int, dtype: str, layout: str, which: str) -> Any:
    from fastdiff.triton_kernels import _launch, group_norm_silu_plan

    x = torch.empty(16, dtype={"fp32": torch.float32}.get(dtype, torch.bfloat16), device="cuda")
    return group_norm_silu_plan.plan(
        shape[1],
        groups,
        shape[2] * shape[3],
        SIZES[dtype],
        layout == "channels_last",
        arrays=1 if which == "forward" else 2,
        max_blocks=_launch.max_blocks(x.device),
        pairs=_launch.holds_pairs(x),
    )


@pytest.mark.skipif(available("triton") is not None, reason=f"triton: {available('triton')}")
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] * (k not in QUICK_KINDS)) for k in TRITON_KINDS],
)
def test_triton(kind: str, layout: str, backend: str, monkeypatch) -> None:
    """The smallest shape whose forward pass is of that kind, in both passes."""
    dtype, wanted = TRITON_KINDS[kind]
    found = next((s for s in shapes() if wanted(triton_plan(*s, dtype, layout, "forward"))), None)
    if found is None:
        capability = torch.cuda.get_device_capability()
        assert (kind == "cluster" and capability < (9, 0)) or (
            kind == "in pairs" and capability >= (10, 0)
        ), f"no shape has the plan {kind!r}"
        pytest.skip(f"this device has no groups that are held {kind}")
    shape, groups = found
    monkeypatch.setitem(SHAPES, kind, found)
    with recorded("group_norm_silu") as launches:
        check(Case(shape=kind, layout=layout, dtype=dtype), backend)
    print(f"{shape}, {groups} groups, {layout}: {[launch.name for launch in launches]}")
    seen = [launch.name.removeprefix("group_norm_silu_") for launch in launches]
    plans = {w: triton_plan(*found, dtype, layout, w) for w in ("forward", "backward")}
    if plans["forward"].one_pass:
        expected = ["fwd_kernel"]
    else:
        expected = ["fwd_moments_kernel", "fwd_merge_kernel", "fwd_apply_kernel"]
    if plans["backward"].one_pass:
        expected += ["bwd_kernel"]
    else:
        expected += ["bwd_sums_kernel", "bwd_finish_kernel", "bwd_apply_kernel"]
    assert seen[: len(expected)] == expected
    assert seen[len(expected) :] in ([], ["bwd_rows_kernel"])
    plan = plans["forward"]
    assert launches[0].threads == 32 * plan.num_warps
    blocks = shape[0] * plan.channel_tiles(shape[1], groups) * plan.blocks
    if plan.one_pass:
        assert launches[0].blocks == blocks
        assert launches[0].cluster in (plan.blocks, None)


@pytest.mark.skipif(
    torch.cuda.is_available() and not on_software_device(),
    reason="about the software CUDA device: one without room for a cluster of 16",
)
@pytest.mark.skipif(available("cuda") is not None, reason=f"cuda: {available('cuda')}")
@pytest.mark.parametrize("backend", ["cuda"])
def test_a_device_without_room_for_16_blocks(backend: str, monkeypatch) -> None:
    """A slice of a GPU, say: the kernels take clusters of at most 8."""
    skip_where_impossible("cluster 16", device_limits(torch.cuda.get_device_properties()))
    kind = "cluster 16"
    monkeypatch.setitem(SHAPES, kind, find(kind, "contiguous", "forward"))
    runtime = sys.modules["ptx_emulator.cuda_runtime.runtime"]
    room = runtime.resident_clusters
    monkeypatch.setattr(
        runtime, "resident_clusters", lambda *asked: 0 if asked[-1] > 8 else room(*asked)
    )
    with recorded("group_norm_silu") as launches:
        check(Case(shape=kind, layout="contiguous", dtype=KINDS[kind][0]), backend)
    assert {launch.cluster for launch in launches} <= {1, 2, 4, 8}
    assert max(launch.cluster for launch in launches) == 8


@two_devices
@pytest.mark.skipif(available("cuda") is not None, reason=f"cuda: {available('cuda')}")
@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("kind", ["more than 48 KB", "cluster 16"])
def test_kernels_opt_in_on_each_device(kind: str, backend: str) -> None:
    """More shared memory, and clusters of more than 8 blocks, are asked for on every device."""
    skip_where_impossible(kind, device_limits(torch.cuda.get_device_properties()))
    shape, groups = find(kind, "contiguous", "forward")
    x = torch.linspace(-1, 1, math.prod(shape)).view(shape).bfloat16()
    with fastdiff.use_backend(backend):
        one, two = (
            fastdiff.ops.group_norm_silu(x.to(f"cuda:{index}"), groups, None, None)
            for index in range(2)
        )
    assert torch.equal(one.cpu(), two.cpu())
    assert one.isfinite().all()
