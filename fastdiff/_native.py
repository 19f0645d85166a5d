"""Loads the compiled operator libraries, and remembers why one is missing.

The libraries register their kernels with torch's dispatcher when they are loaded; they use only
LibTorch's stable ABI, so one build serves every torch from 2.10 on. Calls and autograd nodes in C++
are outside of it: they serve the torch that they were built with, and any other gets Python's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import pathlib
from types import ModuleType
from typing import NamedTuple

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
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    if kind == "cpu":
        check_instruction_set()
    return None


def check_instruction_set() -> None:
    """Refuse a FASTDIFF_CPU_ISA that this build does not have or this machine does not run.

    The CPU library reads the variable itself, at the first op: "portable", "avx2" or "avx512". Its
    loops are compiled for each; unset, it runs the best.
    """
    wanted = os.environ.get("FASTDIFF_CPU_ISA")
    if wanted and wanted not in (names := isa_names()):
        raise ValueError(
            f"FASTDIFF_CPU_ISA is {wanted!r}; this build has, and this machine runs, "
            f"{', '.join(names)}"
        )


def isa_names() -> tuple[str, ...]:
    """The values of FASTDIFF_CPU_ISA that this build has and this machine runs."""
    return tuple(_ask_cpu_library("fastdiff_isa_names").split())


def simd_level() -> str:
    """The instruction set that the CPU kernels use on this machine, for people."""
    return _ask_cpu_library("fastdiff_simd_level")


def _ask_cpu_library(function: str) -> str:
    """The text that a function of the CPU library returns; OSError if there is no such library."""
    ask = getattr(ctypes.CDLL(str(_FOLDER / "_C_cpu.so")), function)
    ask.restype = ctypes.c_char_p
    return ask().decode()


class BuildInfo(NamedTuple):
    """Facts of the native build, as setup.py writes them beside the libraries."""

    compiler: str
    torch_version: str
    torch_target_version: str
    cuda_version: str
    cuda_arch_list: str


@functools.cache
def build_info() -> BuildInfo | None:
    """The facts of the build; None if it is pure Python."""
    file = _FOLDER / "_build_info.json"
    return BuildInfo(**json.loads(file.read_text())) if file.exists() else None


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
