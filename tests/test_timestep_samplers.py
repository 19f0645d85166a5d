"""Uniform and loss-second-moment timestep sampling (IDDPM eq. 18, Math §6)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion.timestep_samplers import (
    LossSecondMomentTimesteps,
    UniformTimesteps,
    timestep_sampler,
)


def warmed_up(losses, history=10, **options):
    """A sampler that has seen `losses` (T,) at every timestep, `history` times."""
    sampler = LossSecondMomentTimesteps(len(losses), history=history, **options)
    for _ in range(history):
        sampler.update(torch.arange(len(losses)), losses)
    return sampler


def test_uniform_timesteps_are_uniform_with_weight_one():
    t, weights = UniformTimesteps(8).sample(16_000, seed=0)
    counts = t.bincount(minlength=8).double()
    # Five standard errors of a binomial count.
    assert float((counts - 2000).abs().max()) < 5 * (2000 * 7 / 8) ** 0.5
    assert bool((weights == 1).all())
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("name", ["uniform", "loss_second_moment"])
def test_a_timestep_belongs_to_its_sample(name):
    sampler = timestep_sampler(name, 50)
    keys = ops.sample_keys(3, 20)
    whole = sampler.sample(20, 3)
    part = sampler.sample(5, keys[15:])
    assert torch.equal(whole[0][15:], part[0])
    assert torch.equal(whole[1][15:], part[1])
    assert not torch.equal(sampler.sample(20, 4)[0], whole[0])
    torch.manual_seed(1)
    first = sampler.sample(20)[0]
    torch.manual_seed(1)
    assert torch.equal(sampler.sample(20)[0], first)


def test_probabilities_follow_the_formula():
    generator = torch.Generator().manual_seed(0)
    sampler = LossSecondMomentTimesteps(4)
    history = torch.rand(4, 10, generator=generator, dtype=torch.float64)
    for column in history.T:
        sampler.update(torch.arange(4), column)
    root = history.square().mean(1).sqrt()
    expected = 0.999 * root / root.sum() + 0.001 / 4
    torch.testing.assert_close(sampler.probabilities(), expected)
    t, weights = sampler.sample(40_000, seed=1)
    frequency = t.bincount(minlength=4) / 40_000
    assert bool(((frequency - expected).abs() < 5 * (expected / 40_000).sqrt()).all())
    torch.testing.assert_close(weights, (1 / (4 * expected[t])).float())
    torch.testing.assert_close(sampler.weights(torch.arange(4)), (1 / (4 * expected)).float())


def test_weighted_losses_are_unbiased_and_vary_less():
    losses = torch.logspace(0, -3, 100, dtype=torch.float64)
    sampler = warmed_up(losses)
    truth = float(losses.mean())
    estimates = {}
    for name, s in (("importance", sampler), ("uniform", UniformTimesteps(100))):
        t, weights = s.sample(50_000, seed=2)
        values = weights * losses[t]
        assert abs(float(values.mean()) - truth) < 5 * float(values.std()) / 50_000**0.5
        estimates[name] = float(values.std())
    # Weighted losses are nearly constant: all that is left is the uniform part.
    assert estimates["importance"] < 0.05 * estimates["uniform"]


def test_it_is_uniform_until_every_timestep_is_known():
    sampler = LossSecondMomentTimesteps(3, history=2)
    for known in ([0, 0, 0, 1], [1, 2], [1]):
        sampler.update(torch.tensor(known), torch.tensor([5.0] * len(known)))
        torch.testing.assert_close(sampler.probabilities(), torch.full((3,), 1 / 3).double())
        assert bool((sampler.sample(9, 0)[1] == 1).all())
    sampler.update(torch.tensor([2]), torch.tensor([9.0]))
    assert float(sampler.probabilities()[2]) > 0.4


def test_all_losses_zero_are_uniform():
    sampler = warmed_up(torch.zeros(5))
    torch.testing.assert_close(sampler.probabilities(), torch.full((5,), 0.2).double())


def test_the_history_is_the_last_losses_of_every_timestep():
    """Against lists, with repeated timesteps, more of them than fit, in batches of any size."""
    generator = torch.Generator().manual_seed(0)
    sampler = LossSecondMomentTimesteps(6, history=3, uniform=0.01)
    lists = [[] for _ in range(6)]
    for size in (1, 7, 30, 2, 0, 12):
        t = torch.randint(6, (size,), generator=generator)
        loss = torch.rand(size, generator=generator, dtype=torch.float64)
        sampler.update(t, loss)
        for i, value in zip(t.tolist(), loss.tolist(), strict=True):
            lists[i] = [*lists[i], value][-3:]
    root = torch.tensor(lists, dtype=torch.float64).square().mean(1).sqrt()
    torch.testing.assert_close(sampler.probabilities(), 0.99 * root / root.sum() + 0.01 / 6)


def test_losses_that_are_not_finite_leave_no_trace():
    sampler = warmed_up(torch.ones(3))
    before = sampler.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    sampler.update(torch.tensor([0, 1]), torch.tensor([torch.nan, torch.inf]))
    after = sampler.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_state_goes_on_exactly():
    sampler = warmed_up(torch.linspace(1, 2, 7))
    sampler.update(torch.tensor([3, 3, 5]), torch.tensor([8.0, 9.0, 7.0]))
    again = timestep_sampler("loss_second_moment", 7)
    again.load_state_dict(sampler.state_dict())
    for s in (sampler, again):
        s.update(torch.tensor([3, 0]), torch.tensor([0.1, 0.2]))
    assert torch.equal(again.probabilities(), sampler.probabilities())
    assert torch.equal(again.sample(50, 1)[0], sampler.sample(50, 1)[0])
    uniform = UniformTimesteps(7)
    uniform.load_state_dict(uniform.state_dict())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown timestep sampler 'best'; choose from uniform, l"):
        timestep_sampler("best", 10)
    with pytest.raises(ValueError, match="history is 0"):
        LossSecondMomentTimesteps(10, history=0)
    with pytest.raises(ValueError, match="uniform is 0"):
        LossSecondMomentTimesteps(10, uniform=0)
    sampler = LossSecondMomentTimesteps(10)
    with pytest.raises(ValueError, match=r"t has shape \(2,\) .* loss shape \(3,\)"):
        sampler.update(torch.tensor([1, 2]), torch.ones(3))
    with pytest.raises(ValueError, match="largest is 1, but this batch has 2 losses"):
        sampler.update(torch.tensor([1, 2]), torch.ones(2), largest=1)
    with pytest.raises(ValueError, match=r"keys \(3,\)"):
        sampler.sample(3, ops.sample_keys(0, 2))
    with pytest.raises(ValueError, match=r"history of shape \(10, 10\), got \(9, 10\)"):
        sampler.load_state_dict(LossSecondMomentTimesteps(9).state_dict())
    with pytest.raises(ValueError, match=r"history of shape \(10, 10\), got nothing"):
        sampler.load_state_dict({})
    with pytest.raises(ValueError, match="expected an empty state, got count, history"):
        UniformTimesteps(10).load_state_dict(sampler.state_dict())


# ------------------------------------------------------------------ several processes

BATCHES = ([[0, 1, 1, 2], [2, 2]], [[1], [0, 0, 0, 2, 1]], [[2, 0], []])
LARGEST = (4, None, 5)  # known, or to be told by the processes
PROCESS = """
import sys
import torch
from fastdiff.diffusion.timestep_samplers import LossSecondMomentTimesteps

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
sampler = LossSecondMomentTimesteps(3, history=2)
for t, loss, largest in torch.load(f"{folder}/batches.pt")[rank]:
    sampler.update(t, loss, largest=largest)
torch.save(sampler.state_dict(), f"{folder}/state-{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_every_process_remembers_the_losses_of_all(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [
        [
            (torch.tensor(t, dtype=torch.int64), torch.rand(len(t), generator=generator), largest)
            for t in b
        ]
        for b, largest in zip(BATCHES, LARGEST, strict=True)
    ]
    torch.save([[b[rank] for b in batches] for rank in range(2)], tmp_path / "batches.pt")
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), tmp_path], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    alone = LossSecondMomentTimesteps(3, history=2)
    for (t0, loss0, _), (t1, loss1, _) in batches:
        alone.update(torch.cat([t0, t1]), torch.cat([loss0, loss1]))
    for rank in range(2):
        state = torch.load(tmp_path / f"state-{rank}.pt")
        for name, value in alone.state_dict().items():
            assert torch.equal(state[name], value)
