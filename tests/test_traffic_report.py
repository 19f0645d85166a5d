"""The traffic report: counts that are known by hand, and the arithmetic of its predictions."""

from __future__ import annotations

import json
import pathlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from op_harness import available

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import roofline
from benchmarks.audit import traffic, traffic_cases, traffic_page
from benchmarks.bench_eps_loss import gradient, mse
from benchmarks.bench_q_sample import eager_q_sample, eager_with_noise
from benchmarks.roofline import Cost, Gpu

X = torch.zeros(4, 32, 16, 16)
T, TABLE = torch.zeros(4, dtype=torch.int64), torch.zeros(10)


def group_norm_silu(x, weight, bias):
    return F.silu(F.group_norm(x, 8, weight, bias))


def group_norm_silu_gradients(x, weight, bias):
    return torch.autograd.grad(group_norm_silu(x, weight, bias), (x, weight, bias), x.detach())


WEIGHT = torch.zeros(32)
TRAINED = [t.clone().requires_grad_() for t in (X, WEIGHT, WEIGHT)]


@pytest.mark.parametrize(
    ("function", "arguments", "accesses"),
    [
        # reads and writes of whole tensors, as one counts them in PyTorch's CUDA sources
        (group_norm_silu, (X, WEIGHT, WEIGHT), 5),
        (group_norm_silu_gradients, TRAINED, 5 + 8),
        (eager_q_sample, (X, T, TABLE, TABLE, X), 7),
        (eager_with_noise, (X, T, TABLE, TABLE), 8),
        (mse, (X, X.clone()), 4),
        (gradient, (X.clone().requires_grad_(), X), 4 + 3),
        (lambda x: x.view(-1)[:7], (X,), 0),
        (lambda x: x + x, (X,), 2),  # one tensor is read once
        (lambda x: x.to(torch.bfloat16).float(), (X,), 1.5 + 1.5),
        (lambda x: x + x[:1, :1, :1, :1].expand_as(x), (X,), 2),
    ],
)
def test_eager_accesses(function, arguments, accesses):
    moved = sum(cost.bytes for cost in roofline.eager_launches(function, *arguments))
    assert moved / X.nbytes == pytest.approx(accesses, rel=0.01)


def test_predicted_seconds():
    gpu = Gpu("test", bandwidth=1e12, fp32=2e12, multiprocessors=100)
    assert roofline.seconds([Cost(1e6)], gpu, 0.0) == pytest.approx(1e-6)
    assert roofline.seconds([Cost(1e6), Cost(2e6)], gpu, 5e-6) == pytest.approx(13e-6)
    assert roofline.seconds([Cost(1e6, instructions=3e6)], gpu, 0.0) == pytest.approx(3e-6)
    # A quarter of the device, and more blocks than it has multiprocessors.
    assert roofline.seconds([Cost(1e6, blocks=25)], gpu, 0.0) == pytest.approx(4e-6)
    assert roofline.seconds([Cost(1e6, blocks=1000)], gpu, 0.0) == pytest.approx(1e-6)


@pytest.mark.skipif(available("cuda-ptx") is not None, reason="needs nvcc and g++")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_sample_of_the_blocks_counts_as_all_of_them(layout):
    """128 channels of 32x32, two samples: a quarter of the blocks, forward and backward."""
    (site,) = (s for s, batch in traffic_cases.chosen_sites() if (s.channels, batch) == (128, 16))
    for call in traffic_cases.group_norm_calls("bf16", layout, "sm_90", [(site, 2)]):
        whole = traffic.count(call, "cuda", "sm_90", 3e-6)
        part = traffic.count(call, "cuda", "sm_90", 3e-6, last_blocks=32)
        assert whole.ran == 1
        assert part.ran < 0.6
        assert part.blocks == whole.blocks
        # The parameters, which every block reads: at most once more than they are.
        for field in ("moved", "loaded", "stored", "sectors"):
            assert getattr(part, field) == pytest.approx(getattr(whole, field), rel=0.005)


def test_the_page_keeps_the_last_count_and_names_what_is_above(tmp_path):
    def row(op, of_bound, sectors):
        labels = dict.fromkeys(traffic_page.LABELS, "x") | {"op": op}
        numbers = {"launches": 1, "blocks": (4, 1), "ran": 1.0, "moved": 1e6}
        return SimpleNamespace(labels=labels, **numbers, of_bound=of_bound, sectors=sectors)

    path = tmp_path / "counts.csv"
    for made in (row("again", 1.2, 1.0), row("again", 1.04, 1.0), row("much", 1.06, 1.0)):
        traffic_page.append(path, made)
    traffic_page.append(path, row("scattered", 1.0, 2.0))
    rows = traffic_page.read([path])
    assert [r["op"] for r in rows] == ["again", "much", "scattered"]
    assert "| again | x | x | x | 1 | 0 | 1.040 | x x x | 1.00 |" in traffic_page.summary(rows)
    listed = traffic_page.above(rows)
    assert "again" not in listed
    assert "| much | x | x | x | x | x | x | 4+1 | 1.0600 | 1.000 |" in listed
    assert "scattered" in listed


@pytest.mark.skipif(available("triton-ptx") is not None, reason="needs triton and g++")
def test_command_counts_a_backward_pass(tmp_path, capsys):
    """bf16 eps_loss of the digits: its backward reads two tensors and writes one in one launch."""
    path = tmp_path / "traffic.json"
    options = ["--op", "eps_loss", "--backend", "triton", "--images", "ddpm_cifar10"]
    options += ["--layouts", "nchw", "--json", str(path), "--markdown", str(tmp_path / "table.md")]
    assert traffic.main(options) == 0
    assert "PREDICTED" in capsys.readouterr().out
    rows = {row["mode"]: row for row in json.loads(path.read_text())["rows"]}
    tensor = 128 * 3 * 32 * 32 * 2
    for mode, launches, accesses, eager in (
        ("given", 2, 2, 4),
        ("given, backward", 1, 3, 3),
        ("seed", 2, 1, 4),
        ("seed, backward", 1, 2, 3),
    ):
        row = rows[mode]
        assert row["launches"] == launches
        assert row["blocks"][0] == 384
        assert row["moved"] == pytest.approx(accesses * tensor, rel=0.02)
        assert 1 <= row["of_bound"] < 1.02
        assert row["eager_accesses"] == pytest.approx(eager, rel=0.01)
        assert row["predicted"]["H100"] > 3e-6 * launches
    assert "| seed, backward |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    "calls",
    [
        lambda: traffic_cases.image_calls("bf16", "channels_last", ("latent64",)),
        lambda: traffic_cases.group_norm_calls(
            "bf16", "nchw", "sm_90", traffic_cases.chosen_sites(quick=True)
        ),
    ],
)
def test_a_bound_is_not_above_what_eager_moves(calls):
    found = list(calls())
    assert found
    for call in found:
        launches = roofline.eager_launches(call.eager, *call.eager_arguments)
        if call.eager_forward is not None:
            forward = roofline.eager_launches(call.eager_forward, *call.eager_arguments)
            assert len(forward) < len(launches)
            launches = launches[len(forward) :]
        assert call.bound <= 1.001 * sum(cost.bytes for cost in launches)
