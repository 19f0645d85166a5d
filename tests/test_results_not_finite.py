"""A run that has diverged: no command makes a file or a verdict of numbers that are not finite.

Each ends with code 1 and one line that says how many of how many, and leaves the disk as it was.
"""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY

from fastdiff import _cli, evaluate, sample, train
from fastdiff.nn import PRESETS
from fastdiff.samplers import SAMPLERS
from fastdiff.training import RunFolder, TrainConfig, Trainer, load_dataset
from fastdiff.training.checkpoint import load_newest, save

FLAGS = ["--preset", "tiny", "--batch-size", "8", "--timesteps", "20", "--device", "cpu"]
FLAGS += ["--sample-steps", "2", "--num-samples", "4", "--log-every", "1"]
# So large that the weights after a step are finite and what they predict is not.
DIVERGES = ["--lr", "1e6", "--warmup", "0", "--steps", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run whose weights are huge, one with weights that are NaN, and one that is as it should."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        folder = tmp_path_factory.mktemp("diverged")
        config = TrainConfig(
            preset="tiny",
            steps=1,
            batch_size=8,
            timesteps=20,
            num_samples=4,
            sample_steps=2,
            device="cpu",
        )
        run = RunFolder(folder / "good")
        run.create(config)
        Trainer(config, load_dataset("digits"), run, torch.device("cpu")).train()
    saved = load_newest(run.checkpoints, pytest.fail)
    (average,) = saved.emas
    average["conv_in.bias"][:3] = torch.nan
    shutil.copytree(folder / "good", folder / "nan")
    save(folder / "nan/checkpoints", saved, keep=1)
    for weight in average.values():
        weight.fill_(1e30)
    shutil.copytree(folder / "good", folder / "huge")
    save(folder / "huge/checkpoints", saved, keep=1)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder, but for the classifier, which has seen no sample."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(p): p.read_bytes() for p in files if p.name not in ("features.safetensors", ".lock")
    }


@pytest.fixture
def call(monkeypatch, capfd, tmp_path, runs):
    """Call a command in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    for name in ("good", "huge", "nan"):
        (tmp_path / name).symlink_to(runs / name)

    def call(command, *argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [command.PROGRAM, *argv])
        with pytest.raises(SystemExit) as stopped:
            _cli.run(command.PROGRAM, command.main, command.NEEDS)
        out, err = capfd.readouterr()
        return stopped.value.code, out, err

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


def refused(call, runs, command, *argv: str) -> str:
    """The error line of a command that has written nothing."""
    before = contents(runs), contents(Path())
    code, out, err = call(command, *argv, "--device", "cpu")
    assert code == 1, err
    assert out == ""
    assert (contents(runs), contents(Path())) == before
    assert err.count("error: ") == 1
    line = err.splitlines()[-1]
    assert "error: " in line
    return line


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npz", "a.gif"])
def test_no_file_of_samples_is_written(call, runs, name):
    argv = ("huge", "--num", "3", "--steps", "2", "--batch-size", "2", "--out", name)
    line = refused(call, runs, sample, *argv)
    # An animation ends with the first picture of its first batch.
    count = "2 of 2" if name == "a.gif" else "3 of 3"
    assert f"{count} images have pixels that are not finite; nothing was written" in line


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_hides_it(call, runs, sampler):
    # Langevin's noise levels must not be too far apart.
    steps = ["20", "--inner-steps", "30"] if sampler == "annealed_langevin" else ["3"]
    argv = ("huge", "--num", "3", "--sampler", sampler, "--steps", *steps)
    assert "3 of 3 images have pixels" in refused(call, runs, sample, *argv)


@pytest.mark.parametrize("name", ["a.png", "a.npz"])
def test_one_image_of_three_is_counted(call, runs, monkeypatch, name):
    """The others are not written without it either, and an old file stays."""
    right = SAMPLERS["ddim"].sample

    def spoiled(self, *args, **kwargs):
        images = right(self, *args, **kwargs)
        images[1, 0, 2, 3] = torch.inf
        return images

    monkeypatch.setattr(SAMPLERS["ddim"], "sample", spoiled)
    Path(name).write_bytes(b"old")
    argv = ("good", "--num", "3", "--steps", "2", "--out", name, "--force")
    assert "1 of 3 images have pixels" in refused(call, runs, sample, *argv)


def test_weights_that_are_not_finite_are_not_sampled_from(call, runs):
    for command, argv in ((sample, ["--steps", "2"]), (evaluate, ["--bpd"])):
        line = refused(call, runs, command, "nan", *argv)
        assert "checkpoint step-00000001 in nan: 3 of " in line
        assert "weights are not finite: training has diverged" in line


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--bpd"], ["--bpd: 6 of 6 images have a result that is not finite; nothing was"]),
        (["--likelihood"], ["--likelihood: no step", "of 6 samples", "nothing was written"]),
        (["--reconstruction", "--steps", "2"], ["--reconstruction: 6 of 6 images have a result"]),
        (["--frechet", "--features", "own:mean"], ["4 of 4 images have pixels that are not fin"]),
        ([], ["--bpd: 6 of 6 images"]),
    ],
)
def test_no_metric_is_written(call, runs, monkeypatch, flags, fragments):
    own = types.ModuleType("own")
    own.mean = lambda levels: levels.double().flatten(2).mean(2)
    monkeypatch.setitem(sys.modules, "own", own)
    line = refused(call, runs, evaluate, "huge", "--num", "6", "--samples", "4", *flags)
    for fragment in fragments:
        assert fragment in line


def test_a_mean_that_is_not_finite_is_no_result(call, runs, monkeypatch):
    """Every image's number may be finite where their mean is not."""
    monkeypatch.setattr(
        "fastdiff.evaluation.metrics._mean_and_error", lambda values: (1.0, float("nan"))
    )
    line = refused(call, runs, evaluate, "good", "--bpd", "--num", "4")
    assert "--bpd: 1 of 1 numbers of its standard_error are not finite" in line


def test_training_says_that_its_grid_could_not_be_drawn(call):
    code, _, err = call(train, *FLAGS, *DIVERGES, "--out", "run")
    assert code == 1
    assert err.count("error: ") == 1
    line = err.splitlines()[-1]
    assert "step 2: 4 of 4 samples have pixels that are not finite: their picture was not" in line
    assert list(Path("run/samples").iterdir()) == []
    assert "NaN" not in Path("run/metrics.jsonl").read_text()
    # Again from its checkpoint, at which all steps are done: the same verdict.
    code, _, err = call(train, "--out", "run", "--resume")
    assert code == 1
    assert "4 of 4 samples have pixels that are not finite" in err.splitlines()[-1]


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(call):
    flags = ["--lr", "1e38", "--warmup", "0", "--steps", "1", "--out", "run"]
    code, _, err = call(train, *FLAGS, *flags)
    assert code == 1
    assert "step 1: " in err.splitlines()[-1]
    assert "weights are not finite" in err.splitlines()[-1]
    assert list(Path("run/checkpoints").iterdir()) == []
    assert not Path("run/model").exists()
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        assert np.isfinite(json.loads(line)["loss"])
