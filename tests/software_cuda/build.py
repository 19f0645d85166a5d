"""Builds the fake libcudart.so.13 and libcuda.so.1, the CPU fallback, and fastdiff's CUDA library.

All are kept in the emulator's cache, by the contents of what they were made of.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ptx_emulator.cache import build_once, cache_directory, digest
from ptx_emulator.compile import host_compiler, run_compiler
from ptx_emulator.nvcc import compile_cached, require_nvcc

_SOURCES = Path(__file__).parent / "csrc"
# Whose kernels: another checkout's where a test runs a copy of this one with the same kernels.
_PROJECT = Path(os.environ.get("SOFTWARE_CUDA_SOURCES") or Path(__file__).resolve().parents[2])
_FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall"]
_RUNTIME_PARTS = ("locks", "streams", "graphs", "memory", "device", "kernels")
# The libraries of torch that use the CUDA runtime.
_USERS = ("libc10_cuda", "libtorch_cuda", "libtorch_python", "libtorch_cuda_linalg")
_USERS += ("libtorch_nvshmem",)


@functools.cache
def torch_folder() -> Path:
    """Without importing torch, which would load the real libraries."""
    spec = importlib.machinery.PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("the software CUDA device needs torch, which is not installed")
    folder = Path(spec.origin).parent
    if not (folder / "lib/libtorch_cuda.so").exists():
        raise RuntimeError("the software CUDA device needs a torch built for CUDA, not for CPUs")
    return folder


@functools.cache
def cuda_include() -> list[str]:
    """Where nvcc finds the CUDA headers, which its wrapper scripts know too."""
    command = [str(require_nvcc()), "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ INCLUDES=(.*)$", text, re.MULTILINE)
    if not found:
        raise RuntimeError(f"{' '.join(command)} names no INCLUDES")
    folders = re.findall(r'-I"?([^"\s]+)"?', found[1])
    return [part for folder in folders for part in ("-isystem", folder)]


def _symbols(library: Path, *flags: str) -> set[str]:
    command = ["nm", *flags, str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in text.splitlines() if line.strip()}


def _compiled(source: Path, *flags: str) -> Path:
    """An object file; the headers of this folder count as part of the source."""
    headers = [path.read_bytes() for path in sorted(_SOURCES.glob("*.h"))]
    command = [*host_compiler().split(), *_FLAGS, *flags, f"-I{_SOURCES}", "-c", str(source)]
    key = digest(*command[:-3], source.read_bytes(), *headers)  # wherever the sources lie
    target = cache_directory() / f"software-cuda-{source.stem}-{key}.o"
    return build_once(target, lambda path: run_compiler([*command, "-o", str(path)]))


def _linked(name: str, inputs: Sequence[str | Path], *flags: str) -> Path:
    """A library with its real name, in a folder named for its contents.

    The inputs' names tell theirs, but where lines are counted: there it is when they were made.
    """
    made = [str(Path(i).stat().st_mtime_ns) for i in inputs if is_counted(i)]
    key = digest(*map(str, inputs), *made, *flags, str(torch_folder()))
    command = [*host_compiler().split(), "-shared", *map(str, inputs), *flags]
    folder = cache_directory() / f"software-cuda-{key}"
    return build_once(folder / name, lambda path: run_compiler([*command, "-o", str(path)]))


def _stubs(objects: Sequence[Path], wanted: set[str], soname: str) -> Path:
    """What of `wanted` the objects lack, as functions that say so and return an error."""
    defined = set().union(*(_symbols(path, "--defined-only") for path in objects))
    lines = ["namespace sc { int unsupported(const char*, const char*); }", 'extern "C" {']
    for name in sorted(wanted - defined):
        lines.append(f'int {name}() {{ return sc::unsupported("{name}", "is not implemented"); }}')
    text = "\n".join([*lines, "}", ""])
    source = cache_directory() / f"software-cuda-missing-{soname}-{digest(text)}.cpp"
    build_once(source, lambda path: path.write_text(text))
    return _compiled(source, "-w")


@functools.cache
def _undefined_in_torch() -> set[str]:
    paths = [torch_folder() / f"lib/{library}.so" for library in _USERS]
    names = [_symbols(path, "-D", "--undefined-only") for path in paths if path.exists()]
    return set().union(*names)


@functools.cache
def fake_runtime() -> Path:
    """libcudart.so.13 with every function that torch's libraries import."""
    wanted = {name for name in _undefined_in_torch() if re.match(r"(__)?cuda[A-Z]", name)}
    objects = [_compiled(_SOURCES / f"{part}.cpp", *cuda_include()) for part in _RUNTIME_PARTS]
    objects.append(_stubs(objects, wanted, "cudart"))
    script = cache_directory() / "software-cuda-version.map"
    build_once(script, lambda path: path.write_text("libcudart.so.13 { global: *; };\n"))
    flags = ["-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={script}", "-Wl,-z,defs", "-ldl"]
    return _linked("libcudart.so.13", objects, *flags)


@functools.cache
def fake_driver() -> Path:
    """libcuda.so.1 with every function that torch and Triton ask the driver for."""
    torch = torch_folder()
    used = _symbols(torch / "lib/libcaffe2_nvrtc.so", "-D", "--undefined-only")
    header = (torch / "include/c10/cuda/driver_api.h").read_text()
    used |= set(re.findall(r"_\((cu[A-Z]\w+),", header))
    triton = torch.parent / "triton/backends/nvidia/driver.c"
    if triton.exists():
        used |= set(re.findall(r"\b(cu[A-Z]\w+)\(", triton.read_text()))
    wanted = {name for name in used if re.match(r"cu[A-Z]", name)}
    objects = [_compiled(_SOURCES / "driver.cpp", *cuda_include())]
    objects.append(_stubs(objects, wanted, "cuda"))
    flags = ["-Wl,-soname,libcuda.so.1", "-Wl,-z,defs"]
    return _linked("libcuda.so.1", [*objects, fake_runtime()], *flags)


@functools.cache
def fake_nccl() -> Path | None:
    """libnccl.so.2 without anything in it, if torch's libraries want one."""
    wanted = {name for name in _undefined_in_torch() if re.match(r"nccl[A-Z]", name)}
    if not wanted:
        return None
    objects = [_compiled(_SOURCES / "nccl.cpp", *cuda_include())]
    objects.append(_stubs(objects, wanted, "nccl"))
    return _linked("libnccl.so.2", [*objects, fake_runtime()], "-Wl,-soname,libnccl.so.2")


@functools.cache
def fallback() -> Path:
    """The CPU kernels under torch's CUDA operators."""
    torch = torch_folder()
    include = [f"{torch}/include", f"{torch}/include/torch/csrc/api/include"]
    flags = [part for folder in include for part in ("-isystem", folder)]
    made = _compiled(_SOURCES / "fallback.cpp", *flags, *cuda_include())
    libraries = [f"-L{torch}/lib", "-ltorch_cpu", "-ltorch_cuda", "-lc10_cuda", "-lc10"]
    options = [*libraries, f"-Wl,-rpath-link,{torch}/lib", "-Wl,--allow-shlib-undefined"]
    return _linked("fallback.so", [made, fake_runtime()], *options)


def _kernels(sources: Sequence[Path], arch: str, *flags: str) -> list[Path]:
    virtual = arch.replace("sm_", "compute_")
    # The same options as the launchers of tests/op_harness have, so that both share the objects.
    options = ["-c", "-O3", "-std=c++17", "-lineinfo", "--no-compress", "-cudart", "none"]
    options += ["-gencode", f"arch={virtual},code={virtual}", "-Xcompiler", "-fPIC", *flags]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: _object(path, options), sources))


def coverage_folder() -> Path | None:
    """Where gcov will look for the objects of a run that counts lines."""
    folder = os.environ.get("SOFTWARE_CUDA_COVERAGE")
    return Path(folder) if folder else None


def is_counted(path: str | Path) -> bool:
    folder = coverage_folder()
    return folder is not None and Path(path).is_relative_to(folder)


def _object(source: Path, options: list[str]) -> Path:
    """Compiled by nvcc."""
    if (folder := coverage_folder()) is None:
        return compile_cached(source, options, ".o")
    target = folder / f"{source.parent.name}_{source.stem}.o"
    if not target.exists():
        command = [str(require_nvcc()), *options, "-Xcompiler", "--coverage", str(source)]
        run_compiler([*command, "-o", str(target)])
    return target


def small_library(source: Path, arch: str) -> Path:
    """A library of one .cu file, linked with the fake runtime."""
    return _linked(f"{source.stem}.so", [*_kernels([source], arch), fake_runtime()])


@functools.cache
def cuda_library(arch: str) -> Path:
    """fastdiff's _C_cuda.so with PTX only, linked with the fake runtime. arch: such as "sm_90"."""
    csrc, torch = _PROJECT / "csrc", torch_folder()
    flags = [f"-I{csrc / 'include'}", f"-I{csrc / 'cuda'}", "-std=c++20"]
    sources = sorted((csrc / "cuda").glob("*.cu"))
    objects = _kernels(sources, arch, *flags, "--expt-relaxed-constexpr")
    version = re.search(r'TORCH_TARGET_VERSION = "(\w+)"', (_PROJECT / "setup.py").read_text())[1]
    # nvcc lists what a binding includes, torch's headers too, and compiles again if one changes.
    binding = ["-c", "-std=c++20", "-O1", "-cudart", "none", "-Xcompiler", "-fPIC"]
    binding += [f"-I{csrc / 'include'}", "-isystem", f"{torch}/include"]
    binding += [f"-DTORCH_TARGET_VERSION={version}", "-DUSE_CUDA"]
    objects.append(_object(csrc / "bindings/cuda.cpp", binding))
    libraries = [f"-L{torch}/lib", "-ltorch_cpu", "-ltorch", "-ltorch_cuda"]
    inputs = [*objects, fake_runtime()]
    options = ["--coverage"] if coverage_folder() else []
    return _linked("_C_cuda.so", inputs, *libraries, f"-Wl,-rpath-link,{torch}/lib", *options)


def all_libraries(arch: str) -> None:
    """Build what is missing, so that no child process has to."""
    for build in (fake_runtime, fake_driver, fake_nccl, fallback):
        build()
    cuda_library(arch)
