"""Every sampler on the run that `python -m fastdiff.train` makes: pictures of digits, not noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff.sample import generate
from fastdiff.samplers import SAMPLERS, from_name
from fastdiff.training import RunFolder, TrainConfig, Trainer, load_dataset, load_run

# Beside S = 50: the spacings at which eq. 15 and Heun's method drew black and white noise.
REQUESTS = [(50, "leading"), (50, "trailing"), (50, "logsnr"), (10, "trailing")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The default run: 700 steps, about a minute and a half of a core."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "digits")
    config = TrainConfig(device="cpu")
    folder.create(config)
    Trainer(config, load_dataset("digits"), folder, torch.device("cpu")).train()
    return load_run(folder.path)


def closeness(levels: torch.Tensor) -> float:
    """Mean over images of the distance to the nearest digit, over that of digits to each other."""
    digits = torch.from_numpy(load_dataset("digits").images).flatten(1).float()
    own = torch.cdist(digits[:200], digits).topk(2, largest=False).values[:, 1].mean()
    found = torch.cdist(levels.permute(0, 2, 3, 1).flatten(1).float(), digits).min(1).values.mean()
    return float(found / own)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_digits(run, name):
    assert_digits(run, name, [*REQUESTS, (1000, "leading")])


def assert_digits(run, name, requests):
    noise = torch.randint(256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert closeness(noise) > 2.5
    drawn = 0
    for steps, spacing in requests:
        try:
            sampler = from_name(name, run.diffusion, steps=steps, spacing=spacing)
        except ValueError as error:
            refused = name == "annealed_langevin" and "too few" in str(error)
            if not refused:
                raise
            continue
        levels = generate(run, sampler, 32)
        drawn += 1
        assert closeness(levels) < 1.9, (steps, spacing)
        # Digits have few pixels at the very ends of the range: 49 % black, 9 % white.
        extreme = float(((levels == 0) | (levels == 255)).float().mean())
        assert extreme < 0.8, (steps, spacing)
        assert 40 < float(np.mean(levels.numpy())) < 120, (steps, spacing)
    assert drawn >= 3
