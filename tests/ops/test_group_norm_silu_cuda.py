"""group_norm_silu's CUDA kernels: every path of the plan, independence of order, traffic."""

from __future__ import annotations

import pytest
import torch
from op_harness import assert_close, evaluate, implementation_params
from op_harness.group_norm_silu import (
    OPERANDS,
    SHAPES,
    Case,
    Exact,
    arguments,
    grad_output,
    operations,
)
from op_harness.group_norm_traffic import bound, measure, small_bytes

from benchmarks.shapes import GROUP_NORM_BATCHES, GroupNormSite, group_norm_sites

pytestmark = [
    pytest.mark.parametrize("implementation", implementation_params("cuda-ptx")),
]

# What takes which path: (shape, num_groups). 163 KB per block and no clusters on sm_80, 227 KB and
# clusters on sm_90.
PATHS = {
    "split": ((1, 32, 24, 64), 1),  # 192 KB in float32
    "split rows": ((2, 4096, 2, 6), 1),  # many short rows per block
    "split odd": ((1, 3, 131, 129), 1),  # 198 KB, no vectors
    "split wide": ((1, 1040, 9, 10), 2),  # in channels_last strips of 120 channels
    "cluster": ((1, 8, 32, 64), 1),  # 64 KB that several blocks share at batch 1
    "cluster odd": ((1, 6, 37, 41), 2),
}


def check(case: Case, arch: str, **options) -> list:
    """Compare both passes with float64; return the launches."""
    args = arguments(case)
    names = ("x", *(name for name in OPERANDS if args[name] is not None))
    grad = grad_output(case, args["x"])
    result = evaluate(
        "group_norm_silu", "cuda-ptx", args, gradients=names, grad_output=grad, arch=arch, **options
    )
    exact = Exact(args)
    expected, magnitude = exact.forward()
    assert_close(result.outputs[0], expected, magnitude=magnitude, operations=operations(args))
    for name, (value, size) in exact.backward(grad, names).items():
        assert_close(result.gradients[name], value, magnitude=size, operations=2 * operations(args))
    return result.launches


def kernels(launches: list) -> list[str]:
    known = (
        *("moments", "statistics", "bwd_sums", "bwd_means", "bwd_apply", "bwd_parameters"),
        *("apply", "fwd", "bwd"),
    )
    return [next(k for k in known if f"{k}_kernel" in launch.entry) for launch in launches]


SPLIT = ["moments", "statistics", "apply", "bwd_sums", "bwd_means", "bwd_apply"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [name for name in PATHS if name.startswith("split")])
def test_split(implementation, shape, layout, monkeypatch):
    """Kernels that read x twice, on a device where the groups do not fit."""
    monkeypatch.setitem(SHAPES, shape, PATHS[shape])
    launches = check(Case(shape=shape, layout=layout), "sm_80", seed=3)
    parameters = [] if PATHS[shape][0][0] == 1 else ["bwd_parameters"]
    assert kernels(launches) == SPLIT + parameters


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "dtype"), [("cluster", "bf16"), ("cluster odd", "fp32")])
def test_clusters(implementation, shape, dtype, layout, monkeypatch):
    """One pass by several blocks, which read each other's partial sums."""
    monkeypatch.setitem(SHAPES, shape, PATHS[shape])
    launches = check(Case(shape=shape, layout=layout, dtype=dtype), "sm_90", seed=5)
    assert kernels(launches) == ["fwd", "bwd"]
    assert all(launch.cluster and launch.cluster[0] > 1 for launch in launches)


@pytest.mark.parametrize("values", ["mean 1e4", "constant"])
def test_statistics_of_a_split_do_not_cancel(implementation, values, monkeypatch):
    monkeypatch.setitem(SHAPES, "split", PATHS["split"])
    check(Case(shape="split", values=values, operands=("weight", "bias")), "sm_80")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])  # split and one pass
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_outlier_costs_no_accuracy(implementation, layout, arch):
    """Sums are relative to a value of their item; the first pixel is far off all others.

    Its square is 2^20 times the others'. Relative to it the variance would lose one unit in the
    last place per pixel: 40000 of them, 2.4e-3.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 8, 200, 200, generator=generator, dtype=torch.float64)
    x = 0.1 * noise
    x[:, :, 0, 0] = 100.0
    x = x.float()
    last = layout == "channels_last"
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    args = {"x": x, "num_groups": 2, "weight": None, "bias": None, "eps": 1e-12}
    args |= {"channel_bias": None, "scale": None, "shift": None, "activation": 0}
    result = evaluate("group_norm_silu", "cuda-ptx", args, arch=arch, racecheck=False)
    variance = result.outputs[2].double() ** -2
    expected = x.double().reshape(1, 2, -1).var(2, unbiased=False)
    assert ((variance - expected).abs() <= 1e-4 * expected).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_does_not_depend_on_its_batch(implementation, layout, monkeypatch):
    """Alone it is shared by a cluster, among 140 it has a block: the same bits, in any order."""
    monkeypatch.setitem(SHAPES, "many", ((140, 8, 8, 64), 1))
    case = Case(shape="many", layout=layout, dtype="fp32")
    args, grad = arguments(case), grad_output(case, arguments(case)["x"])
    names = ("x", "channel_bias", "scale", "shift")
    results = []
    for samples, seed in ((slice(0, 140), 1), (slice(7, 8), 2)):
        part = {
            k: v[samples] if isinstance(v, torch.Tensor) and v.dim() > 1 else v
            for k, v in args.items()
        }
        results.append(
            evaluate(
                "group_norm_silu",
                "cuda-ptx",
                part,
                gradients=names,
                grad_output=grad[samples],
                seed=seed,
                racecheck=False,
            )
        )
    many, alone = results
    assert many.launches[0].cluster is None
    assert alone.launches[0].cluster[0] > 1
    assert torch.equal(many.outputs[0][7:8], alone.outputs[0])
    for name in names:
        assert torch.equal(many.gradients[name][7:8], alone.gradients[name])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [4, 12])
def test_samples_that_share_a_block(implementation, batch, layout, arch, monkeypatch):
    """Of small maps: one launch if a block has the whole batch, and the same bits as alone."""
    monkeypatch.setitem(SHAPES, "small", ((batch, 64, 4, 4), 4))
    case = Case(shape="small", layout=layout, dtype="bf16")
    launches = check(case, arch, seed=4, racecheck="strict")
    assert launches[1].block[1] == 4
    assert kernels(launches)[1:] == ["bwd"] + ["bwd_parameters"] * (batch > 4)
    args, grad = arguments(case), grad_output(case, arguments(case)["x"])
    names = ("x", "channel_bias", "scale", "shift")
    parts = [
        {k: v[s] if isinstance(v, torch.Tensor) and v.dim() > 1 else v for k, v in args.items()}
        for s in (slice(0, batch), slice(3, 4))
    ]
    many, alone = (
        evaluate("group_norm_silu", "cuda-ptx", part, gradients=names, grad_output=g, arch=arch)
        for part, g in zip(parts, (grad, grad[3:4]), strict=True)
    )
    for name in names:
        assert torch.equal(many.gradients[name][3:4], alone.gradients[name])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_strict_races(implementation, layout):
    """Only barriers and __syncwarp order shared memory, as the PTX manual promises."""
    check(Case(layout=layout, dtype="bf16"), "sm_90", racecheck="strict", seed=11)


def check_traffic(site: GroupNormSite, batch: int, dtype, channels_last: bool, which, arch) -> None:
    shape = site.shape(batch)
    traffic = measure(
        shape, site.num_groups, site.operands, site.activation, dtype, channels_last, which, arch
    )
    accesses = bound(shape, site.num_groups, dtype.itemsize, channels_last, which, arch)
    small = small_bytes(shape, site.num_groups, len(site.operands), which)
    assert traffic.bytes <= 1.05 * (accesses * traffic.tensor_bytes + small), traffic
    assert traffic.sectors <= 1.1, traffic
    # With a channel bias the backward pass reads the first element of every group.
    first_elements = batch * site.num_groups if which == "backward" else 0
    assert traffic.narrow <= first_elements * ("channel_bias" in site.operands), traffic
    one_pass = len(traffic.blocks) <= 2
    if arch != "sm_80" or not one_pass:
        # A block's worth of work is 8 KB. Without clusters a group that fits has one block.
        assert max(traffic.blocks) >= min(128, traffic.tensor_bytes >> 13), traffic


SMALL = [
    ("ddpm_cifar10", 1, 256, 4, torch.bfloat16),
    ("ddpm_cifar10", 2, 256, 8, torch.float32),
    ("ddpm_cifar10", 16, 512, 4, torch.bfloat16),
    ("ddpm_cifar10", 1, 384, 16, torch.bfloat16),
    ("ddpm_cifar10", 1, 128, 32, torch.bfloat16),
]


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("network", "batch", "channels", "side", "dtype"), SMALL)
def test_traffic(implementation, network, batch, channels, side, dtype, channels_last, which):
    site = next(s for s in group_norm_sites(network) if (s.channels, s.height) == (channels, side))
    check_traffic(site, batch, dtype, channels_last, which, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("site", "batch"),
    [(s, b) for n, batches in GROUP_NORM_BATCHES.items() for s in group_norm_sites(n)
     for b in batches if b <= 16],
    ids=str,
)  # fmt: skip
def test_traffic_of_published_sites(implementation, site, batch, dtype, channels_last, which, arch):
    """All of them; batch 128 has the plan of batch 16, so it is not emulated again."""
    check_traffic(site, batch, dtype, channels_last, which, arch)
