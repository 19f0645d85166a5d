"""Settings of this room: what only a device can show (`pytest -m gpu`)."""

from __future__ import annotations

from typing import Any

import pytest

# torch is imported in the fixtures: `pytest --software-cuda tests/gpu` reads this file before the
# device is there.
BACKENDS = ("cuda", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    import fastdiff

    if not (status := fastdiff.backends()[request.param]):
        pytest.skip(f"{request.param}: {status.reason}")
    return request.param


@pytest.fixture
def deterministic_convolutions() -> Any:
    """What is compared bit for bit has to be so outside of fastdiff too."""
    import torch

    flags = torch.backends.cudnn
    with flags.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
