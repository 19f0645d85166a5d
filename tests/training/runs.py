"""A small run, made, resumed, and without what draws by the order of memory."""

import dataclasses
import json

import pytest
import torch

from fastdiff.training import RunFolder, TrainConfig, Trainer
from fastdiff.training.checkpoint import checksum, load_newest

SMALL = TrainConfig(
    preset="tiny",
    steps=12,
    batch_size=8,
    timesteps=50,
    warmup=3,
    log_every=4,
    sample_every=1000,
    checkpoint_every=1000,
    num_samples=4,
    sample_steps=2,
    device="cpu",
    class_cond=True,
    label_dropout=0.3,
    flip=True,
)


def trainer(path, dataset, config=SMALL, **changes):
    config = dataclasses.replace(config, **changes)
    config.validate()
    folder = RunFolder(path)
    folder.create(config)
    return Trainer(config, dataset, folder, torch.device("cpu"))


def resumed(path, dataset, config=SMALL, **changes):
    again = trainer(path, dataset, config, resume=True, **changes)
    again.restore(load_newest(again.folder.checkpoints, pytest.fail))
    return again


def craft(path, values):
    """Write a checkpoint.json or config.json as somebody does who knows of its checksum."""
    path.write_text(json.dumps({**values, "checksum": checksum(values)}))
