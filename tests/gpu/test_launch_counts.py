"""How many kernels a step launches, counted: more of them are a slower product at small batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu.needs import GPU
from gpu.software import on_software_device

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    *GPU,
    pytest.mark.skipif(not on_software_device(), reason="only the device in software counts them"),
]


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # benchmarks/ is not installed


def test_a_sampler_step_of_ddpm_cifar10() -> None:
    """The numbers of docs/performance.md."""
    import torch

    from benchmarks import launches

    found = launches.sampler_step(
        "ddpm_cifar10", True, dtype=torch.bfloat16, memory_format=torch.channels_last
    )
    print(found)
    assert found.kernels == 52
    assert found.kernels + found.operators <= 200
    assert found.total <= 217


@pytest.mark.parametrize(
    ("preset", "most"), [("digits", 332), pytest.param("ddpm_cifar10", 710, marks=pytest.mark.slow)]
)
def test_a_training_step_in_bfloat16(preset: str, most: int) -> None:
    from benchmarks import launches

    found = launches.training_step(preset, amp="bf16", channels_last=True)
    plain = launches.training_step(preset, exact=True)
    print(found, plain)
    assert found.total <= most
    assert found.total < plain.total  # two casts of each of its weights would be more
