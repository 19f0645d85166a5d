"""How launchers ask for the error of a launch, which the emulator cannot tell apart."""

from __future__ import annotations

import pathlib
import re

CSRC = pathlib.Path(__file__).resolve().parents[1] / "csrc"


def code_of(path: pathlib.Path) -> str:
    return re.sub(r"//.*", "", path.read_text())


def test_a_launch_returns_its_own_error() -> None:
    """`<<<>>>` leaves its error where that of other code may be, and cudaGetLastError takes it."""
    sources = {
        path.name: code_of(path) for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh")
    }
    assert len(sources) > 20
    assert [name for name, code in sources.items() if "<<<" in code] == []
    asked = {name: code.count("cudaGetLastError") for name, code in sources.items()}
    assert {name: n for name, n in asked.items() if n} == {"group_norm_silu_launch.cuh": 1}


def test_kernel_attributes_are_set_in_one_place() -> None:
    """To a maximum, under a lock: a value per launch would be another thread's too."""
    sources = {path: code_of(path) for path in (CSRC / "cuda").iterdir()}
    setters = [path.name for path, code in sources.items() if "cudaFuncSetAttribute(" in code]
    assert setters == ["group_norm_silu_launch.cuh"]
    (code,) = (code for path, code in sources.items() if path.name == setters[0])
    assert code.count("cudaFuncSetAttribute(") == 1
    assert code.index("lock_guard") < code.index("cudaFuncSetAttribute(")
