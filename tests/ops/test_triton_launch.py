"""What happens around the launch of a Triton kernel."""

from __future__ import annotations

import sys
import time

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastdiff.triton_kernels import _launch


@pytest.mark.parametrize(("terminal", "seconds", "lines"), [(1, 0.5, 1), (1, 0, 0), (0, 0.5, 0)])
def test_a_terminal_is_told_that_kernels_are_compiled(
    terminal, seconds, lines, monkeypatch, capsys
) -> None:
    """Once, and only while somebody waits."""
    monkeypatch.setattr(_launch, "_known", set())
    monkeypatch.setattr(_launch, "_told", type(_launch._told)())
    monkeypatch.setattr(_launch, "_run", lambda *_: time.sleep(seconds))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(terminal))
    for kernel in ("one", "another", "one"):
        _launch.launch(kernel, 1, torch.device("cpu"))
    assert capsys.readouterr().err.count("compiling Triton kernels ...\n") == lines
