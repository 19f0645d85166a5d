"""Whole commands on a device give what they give on the CPU.

Trainings start from the same weights and draw the same noise, so that losses differ by rounding
alone, which Adam and the steps amplify; images of one network differ by a level at most.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu.needs import GPU
from gpu.software import on_software_device
from tiny import TINY

from fastdiff import _cli, evaluate, sample, train, verify
from fastdiff.nn import PRESETS
from fastdiff.samplers import SAMPLERS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = GPU

FLAGS = ["--preset", "tiny", "--steps", "4", "--batch-size", "8", "--timesteps", "20"]
# A network that answers with zeros, as at the start, has a loss that no image changes.
FLAGS += ["--lr", "1e-3", "--warmup", "0"]
FLAGS += ["--sample-steps", "2", "--num-samples", "4", "--log-every", "1", "--seed", "3"]

TRAININGS = {
    "fp32, accumulated": ("--grad-accum", "2"),
    "bf16, channels_last, accumulated": ("--amp", "bf16", "--channels-last", "--grad-accum", "2"),
    "fp16": ("--amp", "fp16"),
    "averages, v": ("--ema", "0.9", "0.99", "--prediction", "v", "--weighting", "min_snr"),
    "classes": ("--class-cond", "--self-conditioning"),
    "hybrid": ("--loss", "hybrid", "--variance", "learned_range", "--channels-last"),
    "bound": ("--loss", "kl", "--variance", "learned", "--timestep-sampler", "loss_second_moment"),
    "huber, x0, flipped": ("--loss", "huber", "--prediction", "x0", "--flip"),
}
QUICK = ("fp32, accumulated", "bf16, channels_last, accumulated")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable:
    """Call a command in this process; gives what it printed."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)

    def call(module: object, *argv: object) -> str:
        monkeypatch.setattr(sys, "argv", [module.PROGRAM, *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            _cli.run(module.PROGRAM, module.main, getattr(module, "NEEDS", ()))
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
        return out

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> np.ndarray:
    found = np.array([row["loss"] for row in metrics(folder)])
    assert np.isfinite(found).all()
    return found


def tolerance(flags: tuple[str, ...]) -> float:
    """Of a loss. Sums over a few hundred terms and four steps of Adam: a hundred roundings; a GPU
    may also multiply float32 matrices in TF32, as torch's convolutions do by default."""
    unit = 2.0**-24 if on_software_device() else 2.0**-11
    if "bf16" in flags:
        unit = 2.0**-9
    if "fp16" in flags:
        unit = max(unit, 2.0**-12)
    return 100 * unit if unit < 1e-6 else 8 * unit


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in TRAININGS]
)
def test_training(name: str, run: Callable, tmp_path: Path) -> None:
    flags = TRAININGS[name]
    # What is not said would be settled by the device.
    said = () if "--amp" in flags else ("--amp", "off")
    said += () if "--channels-last" in flags else ("--no-channels-last",)
    flags = (*flags, *said)
    found = []
    for device in ("cpu", "cuda"):
        run(train, *FLAGS, *flags, "--device", device, "--out", tmp_path / device)
        found.append(losses(tmp_path / device))
    print(f"{name}: largest difference {np.max(np.abs(found[1] / found[0] - 1)):.2g}")
    np.testing.assert_allclose(found[1], found[0], rtol=tolerance(flags))


def test_what_a_gpu_defaults_to_trains_alike(run: Callable, tmp_path: Path) -> None:
    """In bfloat16 within its rounding of float32; --exact and the flags that it stands for as the
    CPU."""
    said = {"fast": (), "exact": ("--exact",), "flags": ("--amp", "off", "--no-channels-last")}
    for name, flags in said.items():
        run(train, *FLAGS, "--device", "cuda", *flags, "--out", tmp_path / name)
    run(train, *FLAGS, "--device", "cpu", "--out", tmp_path / "cpu")
    found = {name: losses(tmp_path / name) for name in (*said, "cpu")}
    settings = json.loads((tmp_path / "fast/config.json").read_text())
    assert (settings["amp"], settings["channels_last"]) == ("bf16", True)
    np.testing.assert_allclose(found["fast"], found["cpu"], rtol=tolerance(("bf16",)))
    for name in ("exact", "flags"):
        np.testing.assert_allclose(found[name], found["cpu"], rtol=tolerance(()))
    assert not np.array_equal(found["fast"], found["exact"])


def test_resuming(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two parts as in one, bit for bit, dropout included."""
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(TINY, dropout=0.3))
    flags = (*FLAGS, "--device", "cuda", "--lr-schedule", "constant", "--exact")
    run(train, *flags, "--out", tmp_path / "one")
    run(train, *flags, "--steps", 2, "--out", tmp_path / "two")
    run(train, "--resume", "--steps", 4, "--device", "cuda", "--out", tmp_path / "two")
    if on_software_device():  # on a GPU torch's own kernels add up in any order
        assert losses(tmp_path / "one").tolist() == losses(tmp_path / "two").tolist()
    np.testing.assert_allclose(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=tolerance(())
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on the CPU, with classes and two averages."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        flags = ["--class-cond", "--ema", "0.5", "0.9", "--lr", "1e-2", "--device", "cpu"]
        assert train.main([*FLAGS, *flags, "--out", str(folder)]) == 0
    return folder


def images(run: Callable, trained: Path, device: str, folder: Path, *options: object) -> np.ndarray:
    out = folder / f"{device}.npz"
    command = (trained, "--device", device, "--num", 4, "--steps", 3, "--out", out)
    run(sample, *command, *options)
    return np.load(out)["arr_0"].astype(int)


# With fewer steps its levels are too far apart.
OPTIONS = {"annealed_langevin": ("--steps", 20, "--step-size", 1.5)}
SAMPLINGS = [
    *((name, *OPTIONS.get(name, ())) for name in SAMPLERS),
    ("ddim", "--guidance-scale", 2.0, "--eta", 1.0, "--dynamic-threshold", 0.995),
]


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=" ".join(map(str, o)), marks=[pytest.mark.slow] * (k > 1))
     for k, o in enumerate(SAMPLINGS)],
)  # fmt: skip
def test_sampling(options: tuple, run: Callable, trained: Path, tmp_path: Path) -> None:
    cpu, cuda = (
        images(run, trained, device, tmp_path, "--sampler", *options) for device in ("cpu", "cuda")
    )
    assert cpu.std() > 1
    difference = np.abs(cpu - cuda)
    # A value at the edge between two levels; TF32 moves more of them.
    assert difference.max() <= (1 if on_software_device() else 4)
    assert (difference == 0).mean() > (0.99 if on_software_device() else 0.8)


def test_sampling_with_a_cuda_graph(run: Callable, trained: Path, tmp_path: Path) -> None:
    options = ("--guidance-scale", 2.0, "--sampler", "ddpm", "--batch-size", 3)  # 3 and 1
    folders = tmp_path / "without", tmp_path / "with"
    for folder in folders:
        folder.mkdir()
    without = images(run, trained, "cuda", folders[0], *options)
    graphed = images(run, trained, "cuda", folders[1], *options, "--cuda-graph")
    assert np.abs(without - graphed).max() <= 1
    assert without.std() > 1


@pytest.mark.slow
def test_evaluation(run: Callable, trained: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        options = ("--num", 4, "--steps", 5, "--probes", 1, "--samples", 8, "--sample-steps", 3)
        run(evaluate, trained, "--device", device, *options)
        files = sorted((trained / "evaluation").glob("*.json"))
        found.append({path.stem: json.loads(path.read_text()) for path in files})
    assert set(found[0]) >= {"bpd", "likelihood", "reconstruction", "frechet"}
    assert_same_numbers(*found, rtol=1e-3 if on_software_device() else 5e-2)


def assert_same_numbers(one: object, other: object, rtol: float, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            # Of a solver that chooses its steps, rounding decides how many it needs.
            bound = max(rtol, 0.3) if key == "evaluations" else rtol
            if key not in ("device", "seconds"):
                assert_same_numbers(one[key], other[key], bound, f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_numbers(a, b, rtol, f"{where}[{k}]")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=rtol, abs=rtol), where
    else:
        assert one == other, where


VERIFIED = ["q_sample", pytest.param(None, marks=pytest.mark.slow)]


@pytest.mark.parametrize("op", VERIFIED)
def test_verification(op: str | None, run: Callable) -> None:
    printed = run(verify, "--device", "cuda", *(("--op", op) if op else ()))
    last = printed.splitlines()[-1]
    results = int(re.match(r"(\d+) results on ", last)[1])
    assert last.endswith("all within their bounds")
    for backend in ("cuda", "triton"):
        assert f" {backend} " in printed
    assert results >= (100 if op else 1251)


# A few shapes: the device in software takes hours for all.
BENCHMARK = ("--shapes", "digits", "--rounds", "1")
QUICK_BENCHMARK = ("q_sample", *BENCHMARK, "--modes", "given")


@pytest.mark.parametrize(
    "options", [QUICK_BENCHMARK, pytest.param(BENCHMARK, marks=pytest.mark.slow)]
)
def test_benchmarks(options: tuple, monkeypatch, capfd, tmp_path: Path) -> None:
    """Ours are right (a peer that is not is named in the table); a software device is named,
    and so are its times.
    """
    monkeypatch.syspath_prepend(str(ROOT))  # benchmarks/ is not installed
    from benchmarks import command, machine

    out = tmp_path / "out.json"
    arguments = ("--quick", "--device", "cuda", "--compile", "none", "--json", str(out))
    assert command.main([*options, *arguments]) == 0
    printed = capfd.readouterr().out
    rows = json.loads(out.read_text())["ops"]
    assert rows
    for row in rows:
        assert [name for name in row["wrong"] if name.startswith("fastdiff")] == [], row
        assert {"fastdiff", "fastdiff (graph)", "eager"} <= set(row["contenders"])
    assert torch.cuda.get_device_name() in printed
    assert (machine.NO_GPU in printed) == on_software_device()
    if on_software_device():
        assert "not judged" in printed
        with pytest.raises(SystemExit):
            command.main(["--publish", "--device", "cuda"])
        assert machine.NO_GPU in capfd.readouterr().err


@pytest.mark.slow
def test_bench_patch(monkeypatch, capfd) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import bench_patch, machine

    options = ("--device", "cuda", "--quick", "--batch", "1", "--layouts", "nchw")
    assert bench_patch.main(list(options)) == 0
    assert (machine.NO_GPU in capfd.readouterr().out) == on_software_device()


@pytest.mark.slow
def test_example_patch_diffusers(monkeypatch, capfd) -> None:
    """The example that takes a device where there is one."""
    pytest.importorskip("diffusers")
    from integrations.test_examples import run as run_example

    run_example(monkeypatch, "patch_diffusers", "--channels", 32, "--batch", 1, "--repeats", 1)
    printed = capfd.readouterr().out
    assert "51 normalizations replaced, 0 left" in printed
    assert float(re.search(r"difference  (\S+),", printed)[1]) < (
        1e-5 if on_software_device() else 1e-2
    )
