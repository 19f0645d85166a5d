"""The committed budget of the compiled kernels: held by the kernels, and able to fail."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections import Counter
from dataclasses import replace

import pytest
from ptx_emulator.nvcc import find_nvcc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.audit import cubin, inspect_kernels, kernel_budget
from benchmarks.audit.cubin import Kernel

needs_cuobjdump = pytest.mark.skipif(
    cubin.find_cuobjdump() is None, reason="cuobjdump is in neither a CUDA toolkit nor triton"
)
# Compiled for the default run; the others compile as long again.
DEFAULT_ARCH = "sm_90"
TRITON_DEFAULT = ("bf16 nchw given", "bf16 nchw guided")
archs = pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=() if arch == DEFAULT_ARCH else pytest.mark.slow)
        for arch in inspect_kernels.ARCHS
    ],
)
REPAIR = "python -m benchmarks.audit.kernel_budget --update accepts them"


@needs_cuobjdump
@archs
def test_cuda_kernels_keep_their_budget(arch: str) -> None:
    library = inspect_kernels.cuda_library()
    if (library is None or arch not in cubin.architectures(library)) and find_nvcc() is None:
        pytest.skip(f"no CUDA kernels for {arch}: not in a built library, and there is no nvcc")
    budgets = kernel_budget.load()[f"cuda {arch}"]
    lines = kernel_budget.compare(budgets, kernel_budget.cuda_kernels(arch))
    assert not lines, "\n".join([*lines, REPAIR])


@needs_cuobjdump
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@archs
def test_triton_kernels_keep_their_budget(arch: str, every: bool) -> None:
    budgets = kernel_budget.load()[f"triton {arch}"]
    names = [n for n in budgets if every or n.endswith(TRITON_DEFAULT)]
    assert names
    kernels = [inspect_kernels.triton_kernel(name, arch) for name in names]
    lines = kernel_budget.compare(budgets, kernels, complete=False)
    assert not lines, "\n".join([*lines, REPAIR])


def test_every_triton_kernel_has_a_budget() -> None:
    pytest.importorskip("triton")
    for arch in inspect_kernels.ARCHS:
        names = set(inspect_kernels.triton_aot.representative_calls(arch))
        assert set(kernel_budget.load()[f"triton {arch}"]) == names


KERNEL = Kernel(
    name="q_sample_fwd_kernel<bf16,8>",
    arch="sm_90",
    registers=40,
    stack=0,
    local=0,
    shared=512,
    threads=128,
    accesses=Counter({("global load", 16): 2, ("global load", 4): 3, ("global store", 16): 1}),
    classes=Counter({"integer": 100, "float": 20, "special": 4}),
)


def _with(**accesses: int) -> Kernel:
    """KERNEL with other accesses, such as `load16=1`."""
    kinds = {"load": "global load", "store": "global store", "local": "local load"}
    changed = Counter(KERNEL.accesses)
    for name, number in accesses.items():
        word = name.rstrip("0123456789")
        changed[kinds[word], int(name.removeprefix(word))] = number
    return replace(KERNEL, accesses=+changed)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (KERNEL, None),
        (replace(KERNEL, registers=48), None),  # the slack
        (replace(KERNEL, registers=20, shared=0), None),
        (replace(KERNEL, registers=49, threads=None), "registers 40 -> 49"),
        (replace(KERNEL, shared=513), "shared 512 -> 513"),
        (_with(local4=1), "spills 0 -> 1"),
        (_with(load16=1, load4=11), "loads 2x16 3x4 -> 1x16 11x4"),
        (_with(store16=0, store8=2), "stores 1x16 -> 2x8"),
        (replace(KERNEL, threads=1024), "occupancy 75% -> 50%"),
        (replace(KERNEL, classes=Counter(integer=110, float=30, special=8)), None),
        (
            replace(KERNEL, classes=Counter(integer=200, float=20)),
            "integer instructions 100 -> 200",
        ),
        (replace(KERNEL, classes=Counter(exchange=10)), "exchange instructions 0 -> 10"),
        (replace(KERNEL, name="new_kernel"), "new_kernel: no budget"),
    ],
)
def test_regressions_are_named(kernel: Kernel, expected: str | None) -> None:
    budgets = {KERNEL.name: kernel_budget.budget_of(KERNEL)}
    lines = kernel_budget.compare(budgets, [kernel], complete=False)
    if expected is None:
        assert lines == []
    else:
        (line,) = lines
        assert expected in line


def test_a_kernel_that_is_gone_is_named() -> None:
    budgets = {KERNEL.name: kernel_budget.budget_of(KERNEL)}
    assert kernel_budget.compare(budgets, []) == [f"{KERNEL.name}: gone; --update drops it"]


def test_update_then_check(tmp_path, monkeypatch, capsys) -> None:
    """The command fails on a regression, --update accepts it, and then it passes."""
    kernels = [KERNEL]
    monkeypatch.setattr(kernel_budget, "FILE", tmp_path / "budget.json")
    monkeypatch.setattr(kernel_budget, "ROOT", tmp_path)
    monkeypatch.setitem(kernel_budget.KERNELS, "cuda", lambda arch: kernels)
    monkeypatch.setattr(cubin, "find_cuobjdump", lambda: tmp_path)
    options = ["--arch", "sm_90", "--backend", "cuda"]
    assert kernel_budget.main([*options, "--update"]) == 0
    assert kernel_budget.main(options) == 0
    kernels = [replace(KERNEL, registers=200)]
    assert kernel_budget.main(options) == 1
    assert "q_sample_fwd_kernel<bf16,8>: registers 40 -> 200" in capsys.readouterr().out
    assert kernel_budget.main([*options, "--update"]) == 0
    assert kernel_budget.main(options) == 0
