"""FASTDIFF_CPU_ISA: the CPU kernels' loops for other instruction sets than the machine's best."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
from op_harness import available

from fastdiff import _native, info

FOLDER = pathlib.Path(__file__).parent
NAMES = ("portable", "avx2", "avx512")
LEVELS = {"portable": "portable", "avx2": "AVX2", "avx512": "AVX-512"}

# The tests that run again, where the loops of group_norm_silu and Philox have code of their own.
CORE = {
    "test_group_norm_silu.py": "(vectors and normal and silu-cpu) or (odd and bf16 and silu-cpu)"
    " or (test_large and unaligned)",
    "test_group_norm_silu_conditioning.py": "cpu",
    "test_group_norm_silu_dropout.py": "(test_values and odd and cpu) or test_large or same_bits"
    " or (one_mask and cpu)",
    "test_residual_group_norm_silu.py": "(test_values and odd and cpu) or same_bits",
    "test_philox_normal.py": "test_matches and cpu",
    "test_winograd_conv.py": "(test_matches and kernel) or same_bits",
}

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="the CPU library is not built")


def run_again(isa: str, files: list[str], selection: str) -> None:
    names = _native.isa_names()
    if isa not in names:
        pytest.skip(f"this machine and build run {', '.join(names)}")
    if isa == names[-1] and "FASTDIFF_CPU_ISA" not in os.environ:
        pytest.skip("the machine's best: what all other tests run")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *files, "-k", f"test_the_loops or (not ptx and ({selection}))"],
        cwd=FOLDER,
        env={**os.environ, "FASTDIFF_CPU_ISA": isa, "EXPECTED_LEVEL": LEVELS[isa]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("isa", NAMES)
def test_core_cases_again(isa: str) -> None:
    selection = " or ".join(f"({name[:-3]} and ({cases}))" for name, cases in CORE.items())
    run_again(isa, [pathlib.Path(__file__).name, *CORE], selection)


@pytest.mark.slow
@pytest.mark.parametrize("isa", NAMES)
def test_every_op_again(isa: str) -> None:
    files = sorted(path.name for path in FOLDER.glob("test_*.py") if "cuda" not in path.name)
    run_again(isa, files, "(test_forward or test_gradients or test_matches) and cpu")


@pytest.mark.skipif("EXPECTED_LEVEL" not in os.environ, reason="run by the tests above")
def test_the_loops_in_use_are_those_asked_for() -> None:
    level = info.collect()["build"]["CPU instruction set in use"]
    # Other compilers than GCC 12 build one version of the loops, and two of Philox.
    assert os.environ["EXPECTED_LEVEL"] in level or "baseline" in level


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 "])
def test_an_unknown_name_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FASTDIFF_CPU_ISA", name)
    with pytest.raises(ValueError, match=f"FASTDIFF_CPU_ISA is '{name}'.* portable"):
        _native.check_instruction_set()
