"""What is installed: packages, marker files, import cost, and the promises of pyproject.toml."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import fastdiff

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _pyproject() -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    """The list is explicit because triton_kernels/ is installed under another name."""
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "fastdiff").rglob("__init__.py")
    }
    listed = set(_pyproject()["tool"]["setuptools"]["packages"])
    assert listed == found | {"fastdiff.triton_kernels"}


def test_triton_kernels_shadow_nothing() -> None:
    pytest.importorskip("triton")
    import fastdiff.triton_kernels

    assert fastdiff.triton_kernels.__name__ == "fastdiff.triton_kernels"
    assert "triton_kernels" not in sys.modules


def test_version_and_type_marker() -> None:
    assert fastdiff.__version__ == _pyproject()["project"]["version"]
    assert (pathlib.Path(fastdiff.__file__).parent / "py.typed").exists()


def test_import_is_quick_silent_and_needs_no_extra() -> None:
    """At most 0.3 s over torch's own import, no output, nothing but torch and numpy loaded."""
    program = """
import time, torch
start = time.process_time()
import fastdiff
seconds = time.process_time() - start
import sys
extras = "triton diffusers matplotlib PIL sklearn safetensors tqdm tyro yaml torch._dynamo".split()
print(seconds, *[name for name in extras if name in sys.modules and name not in BEFORE])
"""
    program = "import sys, torch\nBEFORE = set(sys.modules)\n" + program
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert all(run.stderr == "" for run in runs)
    words = runs[0].stdout.split()
    assert words[1:] == []
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.3


def test_no_path_of_a_machine_in_messages() -> None:
    """Errors of the compiled library name csrc/..., not the folder it was built in."""
    if not fastdiff.backends()["cpu"]:
        pytest.skip("the CPU library is not built")
    library = pathlib.Path(fastdiff.__file__).parent / "_C_cpu.so"
    content = library.read_bytes()
    assert b"csrc/bindings" in content
    assert b"/csrc/bindings" not in content


def test_kernel_libraries_use_torch_through_its_stable_abi_alone() -> None:
    """Not one of torch's C++ symbols, which change from release to release."""
    nm = shutil.which("nm")
    if nm is None or not fastdiff.backends()["cpu"]:
        pytest.skip("needs nm and the CPU library")
    for library in pathlib.Path(fastdiff.__file__).parent.glob("_C_*.so"):
        command = [nm, "-D", "--undefined-only", "--demangle", library]
        needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "aoti_torch_" in needed
        assert not re.findall(r"\b(?:at|c10|torch)::.*", needed)
