"""Runs that are killed, told to stop, or whose files are damaged, and then resumed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import Command, run
from matplotlib.figure import Figure
from PIL import Image
from training.conftest import TINY

from fastdiff.nn import PRESETS
from fastdiff.training import RunFolder, TrainConfig, Trainer, load_dataset
from fastdiff.training.checkpoint import load_newest
from fastdiff.training.files import TEMPORARY
from fuzz.budget import fuzz

STEPS, KEEP, STOPPED = 8, 2, 7
FLAGS = f"""--preset tiny --steps {STEPS} --batch-size 4 --timesteps 20 --warmup 3 --device cpu
    --sample-steps 2 --num-samples 2 --log-every 3 --sample-every 2 --checkpoint-every 2
    --keep {KEEP}""".split()
CONFIG = TrainConfig(
    preset="tiny",
    steps=STEPS,
    batch_size=4,
    timesteps=20,
    warmup=3,
    device="cpu",
    sample_steps=2,
    num_samples=2,
    log_every=3,
    sample_every=2,
    checkpoint_every=2,
    keep=KEEP,
)
# Of each fuzzer, when nobody says otherwise.
SECONDS = 10
CLOCKS = ("images_per_second", "memory_mib")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """A small network; and plots without their seconds of layout, but written all the same."""

    def save(figure, file, **_):
        Image.new("L", (8, 8)).save(file, "PNG")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setattr(Figure, "savefig", save)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    """A run that nothing happened to, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    assert run("train", *FLAGS, "--out", "run", folder=folder).code == 0
    return folder / "run", time.monotonic() - start


@pytest.fixture(scope="module")
def stopped(quick, tmp_path_factory):
    """A run that was told to stop, and what is drawn from each of its checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    path = RunFolder(folder / "run")
    path.create(CONFIG)
    trainer = Trainer(CONFIG, load_dataset("digits"), path, torch.device("cpu"))
    assert not trainer.train(lambda: trainer.step == STOPPED)
    drawn = {STOPPED: _drawn(folder)}
    newest = path.checkpoints / f"step-{STOPPED:08d}"
    newest.rename(folder / "newest")
    drawn[STOPPED - 1] = _drawn(folder)
    (folder / "newest").rename(newest)
    return folder / "run", drawn


def _drawn(folder: Path) -> np.ndarray:
    flags = ("--num", 2, "--steps", 2, "--out", "drawn.npz", "--force", "--device", "cpu")
    assert run("sample", "run", *flags, folder=folder).code == 0
    with np.load(folder / "drawn.npz") as arrays:
        return arrays["arr_0"]


def check_files(path: Path) -> None:
    """Every file that has its own name is whole, whatever happened."""
    for file in path.rglob("*"):
        parts = file.relative_to(path).parts
        if not file.is_file() or any(part.startswith(TEMPORARY) for part in parts):
            continue
        if file.suffix == ".png":
            Image.open(file).load()
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            safetensors.torch.load_file(file)
        elif file.suffix == ".html":
            assert file.read_text().endswith("</html>")
    load_newest(path / "checkpoints", pytest.fail)


def check_end(path: Path, whole: Path, damaged: Path | None = None, metrics: bool = True) -> None:
    """The run has ended as the one that nothing happened to, but for one damaged picture."""
    ours, theirs = _last(_names(path)), _last(_names(whole))
    assert ours == theirs
    for name in ours:
        if name == damaged or name.name == "loss.png":  # which shows nothing here
            continue
        if name.suffix not in (".safetensors", ".png"):  # times differ in the others
            continue
        assert (path / name).read_bytes() == (whole / name).read_bytes(), name
    if metrics:
        assert _metrics(path) == _metrics(whole)


def _names(path: Path) -> list[Path]:
    return sorted(f.relative_to(path) for f in path.rglob("*") if f.is_file())


def _last(names: list[Path]) -> list[Path]:
    """Without older checkpoints: where a run was told to stop there is one more to keep."""
    last = f"step-{STEPS:08d}"
    return [n for n in names if n.parts[0] != "checkpoints" or n.parts[1] == last]


def _metrics(path: Path) -> list[dict]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [{k: v for k, v in entry.items() if k not in CLOCKS} for entry in entries]


def resume(folder: Path) -> Command:
    """Resume the run, or start it anew where there is nothing to resume."""
    exists = (folder / "run/config.json").exists()
    return run("train", *FLAGS, "--out", "run", *(["--resume"] if exists else []), folder=folder)


def test_killed_runs_end_as_if_they_had_not_been(whole, tmp_path):
    expected, seconds = whole

    def case(numbers: random.Random) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for _ in range(numbers.choice((1, 1, 2, 3))):
            exists = (tmp_path / "run/config.json").exists()
            flags = [*FLAGS, "--out", "run", *(["--resume"] if exists else [])]
            command = Command("train", flags, tmp_path)
            time.sleep(numbers.uniform(0, 1.1 * seconds))
            command.send(signal.SIGKILL)
            assert command.wait() in (0, -signal.SIGKILL), command.error
            if (tmp_path / "run").exists():
                check_files(tmp_path / "run")
        done = resume(tmp_path)
        assert done.code == 0, done.error
        assert "skipping" not in done.error
        check_end(tmp_path / "run", expected)

    fuzz("killed runs", case, SECONDS)


def test_runs_that_were_told_to_stop_end_as_if_they_had_not_been(whole, tmp_path):
    expected, seconds = whole
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def case(numbers: random.Random) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        command = Command("train", [*FLAGS, "--out", "run"], tmp_path)
        command.wait_for(tmp_path / "run/metrics.jsonl")
        sent = [numbers.choice(signums) for _ in range(numbers.choice((1, 1, 1, 2)))]
        for signum in sent:
            time.sleep(numbers.uniform(0, 0.5 * seconds))
            command.send(signum)
        code = command.wait()
        # Stopped, at once, or ended before it could be.
        assert code in (0, 1, *(128 + s for s in sent), *(-s for s in sent)), command.error
        assert "Traceback" not in command.error, command.error
        check_files(tmp_path / "run")
        done = resume(tmp_path)
        assert done.code == 0, done.error
        check_end(tmp_path / "run", expected)

    fuzz("stopped runs", case, SECONDS)


def flip(numbers: random.Random, data: bytearray) -> bytes:
    data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    return bytes(data)


def cut(numbers: random.Random, data: bytearray) -> bytes:
    return bytes(data[: numbers.randrange(len(data))])


def zero(numbers: random.Random, data: bytearray) -> bytes:
    start = numbers.randrange(len(data))
    return bytes(data[:start]) + bytes(len(data) - start)


def test_damaged_runs_end_as_if_they_were_not_or_say_what_is_wrong(whole, stopped, tmp_path):
    expected, _ = whole
    source, drawn = stopped
    files = [name for name in _names(source) if (source / name).stat().st_size]

    def case(numbers: random.Random) -> None:
        path = tmp_path / "run"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, path)
        name = numbers.choice(files)
        damage = numbers.choice((flip, flip, flip, cut, zero, None))
        if damage is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(damage(numbers, bytearray((path / name).read_bytes())))
        flags = ("--num", 2, "--steps", 2, "--out", "drawn.npz", "--force", "--device", "cpu")
        sampled = run("sample", "run", *flags, folder=tmp_path)
        done = run("train", "--out", "run", "--resume", folder=tmp_path)
        for command in (sampled, done):
            # A command fails in one line.
            assert command.code in (0, 1, 2), (name, damage, command.error)
            assert (command.code == 0) == ("error: " not in command.error), (name, command.error)
        if sampled.code == 0:
            step = STOPPED if f"of step {STOPPED} of run" in sampled.error else STOPPED - 1
            with np.load(tmp_path / "drawn.npz") as arrays:
                assert np.array_equal(arrays["arr_0"], drawn[step]), (name, damage)
        if done.code == 0:
            told = "metrics.jsonl" in done.error
            assert not told or name.name == "metrics.jsonl", (name, done.error)
            lost = name if damage is not None or name.suffix != ".png" else None
            if lost is None and not (path / name).exists():
                shutil.copy(source / name, path / name)  # nothing draws an old grid again
            check_end(path, expected, damaged=lost, metrics=not told)

    fuzz("damaged runs", case, SECONDS)
