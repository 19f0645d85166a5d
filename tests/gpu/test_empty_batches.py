"""A batch of no samples: results and gradients are those of the reference, whatever the backend."""

from __future__ import annotations

import pytest
import torch
from gpu.needs import GPU
from gpu.test_streams_and_devices import cases, inputs, results

import fastdiff
from fastdiff.verification.cases import SHAPES, Case

pytestmark = GPU


@cases
def test_against_the_reference(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "nchw", (0, *SHAPES["nchw"][1:]))
    with fastdiff.use_backend("reference"):
        expected = results(case, inputs(case, "cpu"))
    with fastdiff.use_backend(backend):
        found = results(case, inputs(case, "cuda"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, equal_nan=True)  # the mean of nothing is NaN
