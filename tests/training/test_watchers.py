"""TensorBoard and Weights & Biases are told what metrics.jsonl is told."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.training import RunFolder, TrainConfig, Trainer, UserError, load_dataset, watchers
from fastdiff.training.logging import Metrics

CONFIG = TrainConfig(
    preset="tiny",
    steps=4,
    batch_size=8,
    timesteps=20,
    log_every=2,
    sample_every=2,
    num_samples=4,
    sample_steps=2,
    device="cpu",
)


def train(path, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    folder = RunFolder(path)
    folder.create(config)
    Trainer(config, load_dataset("digits"), folder, torch.device("cpu")).train()
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that records what it is told."""
    told = []
    run = types.SimpleNamespace(
        log=lambda values, step: told.append((step, values)), finish=lambda: told.append("finish")
    )
    module = types.ModuleType("wandb")
    module.init = lambda **settings: told.append(settings) or run
    module.Image = lambda grid: ("picture", grid.size)
    module.told = told
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_is_told_every_line_and_grid(wandb, tmp_path):
    first, second = train(tmp_path / "run", wandb="project")
    settings, *told, last = wandb.told
    assert (settings["project"], settings["name"]) == ("project", "run")
    assert settings["dir"] == str(tmp_path / "run")
    assert settings["config"]["batch_size"] == 8
    assert last == "finish"
    assert [step for step, _ in told] == [2, 2, 4, 4]
    for (_, values), entry in zip((told[0], told[2]), (first, second), strict=True):
        assert values["loss"] == entry["loss"]
        tenths = [v for v in entry["loss_by_timestep"] if v is not None]
        assert [v for k, v in values.items() if k.startswith("loss_by_timestep/")] == tenths
        assert None not in values.values()
    assert told[1][1] == {"samples": ("picture", (70, 70))}

    # The same folder goes on with the same run, another one does not.
    for folder in ("run", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        watchers.watchers(dataclasses.replace(CONFIG, wandb="p"), tmp_path / folder, 2)
    again, other = wandb.told[-2:]
    assert again["id"] == settings["id"] != other["id"]
    assert again["resume"] == "allow"


def test_watchers_are_closed_when_training_fails(wandb, tmp_path):
    with (
        pytest.raises(OSError, match="gone"),
        Metrics(
            tmp_path / "m.jsonl",
            0,
            watchers.watchers(dataclasses.replace(CONFIG, wandb="p"), tmp_path, 0),
        ),
    ):
        raise OSError("gone")
    assert wandb.told[-1] == "finish"


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    entries = train(tmp_path / "run", tensorboard=True)
    # A run that was lost and goes on from step 2 hides what it had written after.
    goes_on = watchers.TensorBoard(tmp_path / "run/tensorboard", last_step=2)
    goes_on.write({"step": 3, "loss": 7.0, "grad_norm": None, "loss_by_timestep": [None, 2.0]})
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    goes_on.picture(Image.fromarray(grey), 3)
    goes_on.picture(Image.fromarray(np.stack([grey] * 3, -1)), 5)
    goes_on.close()
    read = EventAccumulator(str(tmp_path / "run/tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [
        (2, pytest.approx(entries[0]["loss"])),
        (3, 7.0),
    ]
    assert [e.step for e in read.Scalars("grad_norm")] == [2]
    assert [(e.step, e.value) for e in read.Scalars("loss_by_timestep/1")][-1] == (3, 2.0)
    pictures = read.Images("samples")
    assert [(e.step, e.width, e.height) for e in pictures] == [(2, 70, 70), (3, 4, 3), (5, 4, 3)]
    for event in pictures[1:]:
        path = tmp_path / "picture.png"
        path.write_bytes(event.encoded_image_string)
        assert np.array_equal(np.asarray(Image.open(path).convert("L")), grey)


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path / "run", wandb="project")
    (written,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert b"loss_by_timestep" in written.read_bytes()
    # What it leaves there does not keep the run from being loaded.
    RunFolder(tmp_path / "run").saved_config("RUN")


@pytest.mark.parametrize(
    ("settings", "module"),
    [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": "project"}, "wandb")],
)
def test_a_package_that_is_missing_is_named(monkeypatch, settings, module):
    monkeypatch.setitem(sys.modules, module, None)
    watchers.check(CONFIG)  # not asked for: not needed
    name = module.rpartition(".")[2]
    with pytest.raises(UserError, match=rf"--{name}.* needs the package {name}; .*pip install"):
        watchers.check(dataclasses.replace(CONFIG, **settings))
