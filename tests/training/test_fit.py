"""What a run on images of one's own does if nobody says how."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fastdiff import train
from fastdiff.nn import PRESETS
from fastdiff.training import fit
from fastdiff.training.config import TrainConfig

CPU = torch.device("cpu")


class Images:
    """A dataset's size, which is all that is looked at."""

    num_classes = 0

    def __init__(self, count, *shape):
        self.count, self.shape = count, shape

    def __len__(self):
        return self.count


def fitted(monkeypatch, seconds, images, **given):
    """The settings on a machine that takes `seconds` for an image, and what is said."""
    monkeypatch.setattr(fit, "_seconds_per_image", lambda *_: seconds)
    config = dataclasses.replace(TrainConfig.for_data("photos"), **given)
    said = []
    return fit.fit(config, given, images, CPU, said.append), said


@pytest.mark.parametrize(
    ("shape", "slow", "fast"),
    [
        ((8, 8, 1), "digits", "digits"),
        ((28, 28, 1), "mnist_small", "mnist"),  # CIFAR-10's has four levels
        ((32, 32, 3), "mnist_small", "ddpm_cifar10"),
        ((64, 64, 3), "small_64", "ddim_celeba64"),
        ((96, 128, 3), "small_128", "small_128"),
        ((256, 256, 3), "small_128", "ddpm_256"),
    ],
)
def test_the_network_is_the_largest_that_the_machine_gets_through(monkeypatch, shape, slow, fast):
    images = Images(100_000, *shape)
    config, said = fitted(monkeypatch, 10.0, images)
    assert (config.preset, config.steps) == (slow, 2000)
    config, _ = fitted(monkeypatch, 1e-7, images)
    assert (config.preset, config.steps) == (fast, 50_000)
    assert all(length % PRESETS[fast].size_divisor == 0 for length in shape[:2])
    assert f"--preset {slow} " in said[0]
    assert "100,000 images of" in said[0]


def test_the_numbers_fit_into_an_hour_and_to_the_data(monkeypatch):
    # 16 images a step: 1.6 s, of which an hour has 2,250.
    config, _ = fitted(monkeypatch, 0.1, Images(10_000, 64, 64, 3))
    assert (config.batch_size, config.steps, config.warmup) == (16, 2200, 220)
    assert config.sample_every == config.checkpoint_every == 220
    # Two thousand times through 40 images are 5,000 steps.
    config, _ = fitted(monkeypatch, 0.001, Images(40, 64, 64, 3))
    assert config.steps == 5000
    assert config.warmup == 500
    sizes = {8: 64, 32: 64, 48: 32, 64: 16, 128: 8, 512: 8}
    for size, batch_size in sizes.items():
        config, _ = fitted(monkeypatch, 0.1, Images(1000, size, size, 3))
        assert config.batch_size == batch_size


def test_what_is_given_stays(monkeypatch):
    images = Images(1000, 64, 64, 3)
    given = {"preset": "mnist", "batch_size": 4, "steps": 30, "warmup": 7, "sample_every": 5}
    config, said = fitted(monkeypatch, 10.0, images, **given, checkpoint_every=9)
    assert not said
    assert {name: getattr(config, name) for name in given} == given
    config, _ = fitted(monkeypatch, 10.0, images, steps=30)
    assert (config.steps, config.preset, config.warmup) == (30, "small_64", 3)
    # A first look is at the network of the whole run, and a longer run may need a smaller one.
    whole, _ = fitted(monkeypatch, 1e-4, images)
    look, _ = fitted(monkeypatch, 1e-4, images, steps=30)
    longer, _ = fitted(monkeypatch, 1e-4, images, steps=2_000_000)
    assert whole.preset == look.preset == "ddim_celeba64"
    assert longer.preset == "small_64"
    look, _ = fitted(monkeypatch, 0.01, images, steps=30)
    assert look.preset == "small_64"
    config, _ = fitted(monkeypatch, 10.0, images, preset="digits")
    assert (config.preset, config.steps) == ("digits", 2000)
    digits = TrainConfig.for_data("digits")
    assert fit.fit(digits, (), Images(1797, 8, 8, 1), CPU, said.append) is digits
    # No preset takes images of 33 pixels; building the network says what would.
    config, said = fitted(monkeypatch, 10.0, Images(10, 33, 33, 1))
    assert not said
    assert config.preset == TrainConfig.for_data("photos").preset


@pytest.mark.parametrize("source", ["flags", "file"])
def test_the_command_writes_what_it_chose(tmp_path, monkeypatch, source, capsys):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    flags = ["--data", str(tmp_path / "images.npz"), "--out", str(tmp_path / "run")]
    if source == "flags":
        flags += ["--steps=4", "--num-samples", "4"]
    else:
        (tmp_path / "run.toml").write_text("steps = 4\nnum_samples = 4\n")
        flags += ["--config", str(tmp_path / "run.toml")]
    flags += ["--sample-steps", "2", "--log-every", "1"]
    assert train.main(flags) == 0
    said = capsys.readouterr().err
    assert "chosen for 6 images of 8x8 on this machine: --preset digits --batch-size 64" in said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["preset"], config["steps"], config["batch_size"]) == ("digits", 4, 64)
    assert config["prediction"] == "v"
    assert train.main([*flags, "--resume"]) == 0
    assert "chosen for" not in capsys.readouterr().err
