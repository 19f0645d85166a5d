"""Triton's kernels compiled ahead of time for an AMD GPU. Nothing here runs on one."""

from __future__ import annotations

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the root and not installed

from benchmarks.audit import triton_aot  # noqa: E402

ARCH = "gfx942"  # for gfx1100 the compiler of Triton 3.8 crashes on finish_sums_kernel


@pytest.mark.slow
def test_all_kernels_compile() -> None:
    """All launches of every launcher: what ROCm would compile."""
    pytest.importorskip("triton")
    failed = {}
    for name, call in triton_aot.representative_calls(ARCH).items():
        with triton_aot.recorded_launches() as launches:
            call()
        assert launches
        for launch in launches:
            try:
                compiled = triton_aot.compile_launch(launch, ARCH)
            except Exception as error:  # whatever a compiler raises: all of them are listed
                failed[name, launch.kernel.__name__] = f"{type(error).__name__}: {error}"
            else:
                assert compiled.asm["hsaco"].startswith(b"\x7fELF"), name
    assert not failed
