"""Loads the compiled operator libraries, and remembers why one is missing.

The libraries register their kernels with torch's dispatcher when they are loaded; they use only
LibTorch's stable ABI, so one build serves every torch from 2.10 on. Calls and autograd nodes in C++
are outside of it: they serve the torch that they were built with, and any other gets Python's.
"""

from __future__ import annotations

import functools
import importlib
import os
import pathlib
from types import ModuleType

import torch

_FOLDER = pathlib.Path(__file__).parent

_NOT_BUILT = {
    "cpu": "its library was not built (no C++ compiler at install time, or FASTDIFF_BUILD=none); "
    "install one and run `pip install` again",
    "cuda": "its library was not built (no nvcc at install time, or FASTDIFF_BUILD=cpu or none); "
    "set CUDA_HOME and run `pip install` again",
}


@functools.cache
def load(kind: str) -> str | None:
    """Load the "cpu" or "cuda" library once. None if that worked, else why not."""
    if kind == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    path = _FOLDER / f"_C_{kind}.so"
    if not path.exists():
        return _NOT_BUILT[kind]
    if kind == "cpu":
        check_instruction_set()
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    return None


def check_instruction_set() -> None:
    """Refuse a FASTDIFF_CPU_ISA that this build does not have or this machine does not run.

    The CPU library reads the variable itself, once: "portable", "avx2" or "avx512". Its loops are
    compiled for each; unset, it runs the best.
    """
    wanted, build = os.environ.get("FASTDIFF_CPU_ISA"), build_info()
    if wanted and build is not None and wanted not in (names := build.isa_names()):
        raise ValueError(
            f"FASTDIFF_CPU_ISA is {wanted!r}; this build has, and this machine runs, "
            f"{', '.join(names)}"
        )


def build_info() -> ModuleType | None:
    """The pybind11 module with the facts of the build, if there is one."""
    try:
        return importlib.import_module("fastdiff._build_info")
    except ImportError:
        return None


@functools.cache
def dispatch() -> tuple[ModuleType | None, str]:
    """The module that calls ops in C++ if it may be used, and what `fastdiff.info` says of it."""
    build = build_info()
    if build is None:
        return None, "Python (no native build)"
    if build.torch_version != torch.__version__:
        return None, f"Python (the build's C++ is for torch {build.torch_version} only)"
    try:
        return importlib.import_module("fastdiff._dispatch"), "C++"
    except ImportError as error:
        return None, f"Python ({error})"
