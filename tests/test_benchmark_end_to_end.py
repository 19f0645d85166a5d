"""The end-to-end benchmarks: equal results before any time, memory, slopes."""

from __future__ import annotations

import pathlib
import platform
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks import command, end_to_end, networks
from benchmarks.end_to_end import Task

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", end_to_end.TASKS)
def test_the_gate_passes_equal_networks_and_finds_a_changed_weight(name: str) -> None:
    made = Task(name, "digits", 2, steps=2).contenders(CPU)
    assert networks.OURS in made
    for network, contender in made.values():
        assert contender.error(contender.run()) is None, network.name
        with torch.no_grad():
            next(p for p in network.module.parameters() if p.dim() == 4).mul_(1.01)
        assert contender.error(contender.run()) is not None, network.name
        assert contender.error(contender.run() * float("nan")) is not None, network.name
        assert contender.peer == (network.name != networks.OURS)


def test_an_optimizer_step_changes_nothing() -> None:
    """Or every repetition would time another network, and the gate would hold for the first."""
    (network, contender) = Task("training_step", "digits", 2).contenders(CPU)[networks.OURS]
    before = [p.clone() for p in network.module.parameters()]
    contender.run()
    assert all(map(torch.equal, before, network.module.parameters()))


def test_a_row_holds_rates_memory_and_sizes() -> None:
    row = end_to_end.measure(Task("sampling", "digits", 2, steps=2), CPU, 1, 1.0)
    assert (row["shape"], row["mode"], row["images"]) == ("digits b2 2 steps", "eager", 2)
    assert not row["wrong"]
    ours = networks.OURS
    assert row["parameters"][ours] == row["parameters"].get("diffusers", row["parameters"][ours])
    assert row["contenders"][ours]["median_s"] > 0


@pytest.mark.skipif(platform.system() != "Linux", reason="reads Linux' high-water mark")
def test_peak_memory_is_that_of_the_call() -> None:
    def call() -> None:
        torch.ones(32 << 18)  # 32 MiB, freed at once

    peak = networks.peak_bytes(call, CPU)
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 31 << 20 <= peak < 48 << 20
    assert networks.peak_bytes(lambda: None, CPU) < 8 << 20


def test_slope() -> None:
    values = [1, 2, 4, 8]
    assert networks.slope(values, [3.0 * v**1.5 for v in values]) == pytest.approx(1.5)


def test_which_networks_run() -> None:
    def chosen(*arguments):
        return list(end_to_end.tasks(command.parse([*arguments, "--device", "cpu"])))

    assert {task.preset for task in chosen("--quick")} == {"digits"}
    assert {task.preset for task in chosen()} == {"digits", "ddpm_cifar10"}
    assert {task.preset for task in chosen("--all")} == set(networks.PUBLISHED)
    assert not any(task.compiled for task in chosen())
    assert {task.compiled for task in chosen("--compile", "all")} == {False, True}
