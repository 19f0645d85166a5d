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
sys.path.insert(0, str(ROOT))  # cuda_archs.py is beside setup.py and not installed

import cuda_archs  # noqa: E402


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


KNOWN = ["7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"]


@pytest.mark.parametrize(
    ("chosen", "architectures"),
    [
        ("", "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        ("Common", "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        ("All", " ".join(KNOWN)),
        ("8.0", "8.0"),
        ("9.0+PTX 8.0", "8.0 9.0+PTX"),
        ("8.0;9.0, 9.0+PTX;", "8.0 9.0+PTX"),
        ("8.0;9.0a", "8.0 9.0a"),
        ("12.0f+PTX", "12.0f+PTX"),
        ("90", "9.0"),
        ("Turing", "7.5+PTX"),
        ("Ampere", "8.0 8.6+PTX"),
        ("Ampere+Tegra", "8.7"),
        ("hopper", "9.0+PTX"),
        ("Ampere;Hopper", "8.0 8.6+PTX 9.0+PTX"),
        ("Blackwell", "10.0 10.3 12.0 12.1+PTX"),
        ("Blackwell+Tegra", "11.0"),
    ],
)
def test_architectures_as_torch_spells_them(chosen, architectures) -> None:
    assert cuda_archs.choose(chosen, KNOWN) == architectures.split()


@pytest.mark.parametrize("chosen", ["Pascal", "Volta", "7.0", "13.0", "H100", "sm_90", "8.0;x"])
def test_architectures_that_cannot_be_built(chosen) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        cuda_archs.choose(chosen, KNOWN)


def test_architectures_of_this_machine(monkeypatch) -> None:
    """Of a GPU that is newer than nvcc, the newest that nvcc knows."""
    import torch

    gpus = [(8, 6), (13, 0), (8, 6)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    assert cuda_archs.choose("native", KNOWN) == ["8.6", "12.1+PTX"]
    gpus.clear()
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        cuda_archs.choose("native", KNOWN)


def test_architectures_agree_with_torch(monkeypatch) -> None:
    """The same options for nvcc as torch's own extensions get, for what both know."""
    from torch.utils import cpp_extension

    for chosen in ("8.0;9.0+PTX", "Turing", "Ampere", "Ada", "Hopper", "Ampere+Tegra;8.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", chosen)
        ours = cuda_archs.gencode(cuda_archs.choose(chosen, KNOWN))
        assert sorted(ours) == sorted(cpp_extension._get_cuda_arch_flags())
