"""Averages whose length is chosen after training are those that training would have kept."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from training.runs import SMALL, resumed, trainer

from fastdiff import sample
from fastdiff.training import posthoc_ema
from fastdiff.training.errors import UserError
from fastdiff.training.posthoc_ema import LENGTHS, LONGEST, PowerEMA, combination, power
from fastdiff.training.trained import load_run

STEPS = 1000
SNAPSHOTS = [*range(32, STEPS, 32), STEPS]
PROFILES = [(t, g) for t in SNAPSHOTS for g in map(power, LENGTHS)]


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, LONGEST])
def test_the_length_is_the_profiles_standard_deviation(length):
    g, t = power(length), (np.arange(1_000_000) + 0.5) / 1e6
    profile = (g + 1) * t**g
    mean = (profile * t).mean()
    deviation = math.sqrt((profile * (t - mean) ** 2).mean())
    assert deviation == pytest.approx(length, rel=1e-5)


def test_the_running_average_follows_the_formula():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema, g = PowerEMA(model, 0.1), power(0.1)
    history = []
    for _ in range(50):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update()
        history.append(model.weight.detach().clone())
    # A step's weight is the integral of the profile over it.
    ends = (torch.arange(51, dtype=torch.float64) / 50) ** (g + 1)
    expected = sum(w * h for w, h in zip(ends.diff(), history, strict=True))
    torch.testing.assert_close(ema.model.weight, expected, rtol=0, atol=1e-13)


# Of smooth trajectories t^k; the worst of five, found by running this. Shorter or longer averages
# than those that were kept are less well resolved.
@pytest.mark.parametrize(
    ("length", "bound"),
    [(0.03, 2e-5), (0.05, 1e-12), (0.075, 2e-6), (0.1, 1e-12), (0.15, 1e-5), (0.2, 3e-4)],
)
def test_a_known_trajectory(length, bound):
    def average(t, g, k):
        return (g + 1) / (g + k + 1) * (t / STEPS) ** k

    weights, g = combination(PROFILES, (STEPS, power(length))), power(length)
    for k in (0, 0.5, 1, 2, 3):
        found = sum(w * average(t, p, k) for w, (t, p) in zip(weights, PROFILES, strict=True))
        assert found == pytest.approx(average(STEPS, g, k), abs=bound)


def test_any_trajectory_is_within_the_bound():
    """A random walk, whose averages were run beside it; the bound is that of Cauchy and Schwarz."""
    rng = np.random.default_rng(0)
    walk = rng.standard_normal((STEPS, 8)).cumsum(0)

    def direct(t, g):
        ends = (np.arange(t + 1) / t) ** (g + 1)
        return np.diff(ends) @ walk[:t]

    norm = np.sqrt((walk**2).sum(0))
    for length in (0.03, 0.075, 0.15, 0.2):
        wanted = STEPS, power(length)
        weights = combination(PROFILES, wanted)
        found = sum(w * direct(*p) for w, p in zip(weights, PROFILES, strict=True))
        bound = posthoc_ema.distance(PROFILES, wanted, weights) * norm
        # Sums over steps for integrals: profiles vary by a few percent within a step at the end.
        assert np.all(np.abs(found - direct(*wanted)) <= 1.1 * bound + 1e-6)


def test_a_run_keeps_them_and_goes_on_with_them(tmp_path, dataset):
    settings = {"posthoc_ema": True, "checkpoint_every": 3, "keep": 4}
    whole = trainer(tmp_path / "whole", dataset, **settings)
    whole.train()
    names = sorted(p.name for p in whole.folder.averages.iterdir())
    assert names == [f"step-{s:08d}.safetensors" for s in (3, 6, 9, 12)]
    # A run that stops between two checkpoints, and goes on.
    stopped = trainer(tmp_path / "stopped", dataset, **settings)
    stopped.train(should_stop=lambda: stopped.step == 5)
    again = resumed(tmp_path / "stopped", dataset, **settings)
    again.train()
    for path in whole.folder.averages.iterdir():
        assert (again.folder.averages / path.name).read_bytes() == path.read_bytes()
    # Those that were kept come back, and one between them lies between.
    for length, ema in zip(LENGTHS, whole.emas[1:], strict=True):
        run = load_run(whole.folder.path, warn=lambda _: None, ema=length)
        assert run.ema == length
        for name, tensor in ema.model.state_dict().items():
            found = run.unet.state_dict()[name]
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-6)


def test_the_command_samples_with_any_length(tmp_path, dataset, capsys):
    run = trainer(tmp_path / "run", dataset, posthoc_ema=True, checkpoint_every=3)
    run.train()
    out = tmp_path / "a.png"
    flags = [str(tmp_path / "run"), "--steps", "2", "--num", "2", "--class-label", "1"]
    assert sample.main([*flags, "--ema", "0.075", "--out", str(out)]) == 0
    assert "(--ema 0.075)" in capsys.readouterr().err
    assert out.exists()
    with pytest.raises(
        UserError, match=r"--ema 0\.4: a relative length is above 0 and at most 0\.289"
    ):
        load_run(tmp_path / "run", ema=0.4)
    path = tmp_path / "run" / "averages" / "step-00000006.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"step-00000006\.safetensors: not a snapshot of this run"):
        load_run(tmp_path / "run", ema=0.07)
    plain = trainer(tmp_path / "plain", dataset)
    plain.train()
    assert not plain.folder.averages.exists()
    with pytest.raises(UserError, match=r"has averages of decay 0\.99$"):
        load_run(tmp_path / "plain", ema=0.05)


@pytest.mark.parametrize(("steps", "every", "expected"), [(12, 3, 3), (800_000, 5000, 25_000)])
def test_there_are_32_snapshots_at_most(steps, every, expected):
    assert posthoc_ema.interval(steps, every) == expected
    assert steps / expected <= 32
    assert dataclasses.replace(SMALL, posthoc_ema=True).identity()["posthoc_ema"]
