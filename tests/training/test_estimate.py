"""The estimate before a run: what it says, and that the run does not notice it."""

import dataclasses

import pytest
import torch
from tiny import TINY

from fastdiff.nn import PRESETS
from fastdiff.training import RunFolder, TrainConfig, Trainer, load_dataset
from fastdiff.training.estimate import Estimate, estimate

CONFIG = TrainConfig(
    preset="tiny", steps=60, batch_size=8, timesteps=20, num_samples=4, sample_steps=2, device="cpu"
)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Makes trainers, each in a folder of its own."""
    tiny = TINY.replace(dropout=0.3)
    monkeypatch.setitem(PRESETS, "tiny", tiny)

    def make(name, **changes):
        folder = RunFolder(tmp_path / name)
        config = dataclasses.replace(CONFIG, **changes)
        folder.create(config)
        return Trainer(config, load_dataset("digits"), folder, torch.device("cpu"))

    return make


def test_the_run_is_the_same_to_the_last_bit(trainer):
    weights = []
    for name in ("with", "without"):
        torch.manual_seed(3)
        run = trainer(name, class_cond=True, self_conditioning=True)
        if name == "with":
            found = estimate(run)
            assert found.steps == 60
            assert found.seconds > 60 * found.seconds_per_step > 0
            assert found.memory_mib > 10
            assert all(p.grad is None for p in run.unet.parameters())
        run.train(should_stop=lambda run=run: run.step == 4)
        weights.append([p.detach().clone() for p in run.unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_short_runs_are_not_kept_waiting(trainer):
    assert estimate(trainer("short", steps=49)) is None


def test_what_it_says():
    text = str(Estimate(2700.0, 0.45, 1300, 6000))
    assert text == (
        "about 45 min at the speed that this machine has now (0.45 s a step), 1.3 GiB of memory; "
        "--steps 700 for a first look"
    )
    assert "first look" not in str(Estimate(600.0, 0.45, 1300, 1300))
