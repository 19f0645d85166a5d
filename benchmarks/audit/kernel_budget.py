"""The compiled kernels against the committed budget: registers, spills, shared memory, widths.

    python -m benchmarks.audit.kernel_budget [--arch sm_90 ...] [--backend cuda] [--update]

Needs no GPU. Prints what became worse as a diff and exits with 1: more registers than the budget
and its slack, any more spilled accesses, more static shared memory, a lower occupancy, fewer bytes
per access, more instructions of a class, a kernel that has no budget or is gone. --update writes
what the compilers make now to kernel_budget.json beside this file; review that diff like code. The
CUDA kernels are those of the built library: build it first.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.audit import cubin, inspect_kernels, triton_aot
from benchmarks.audit.cubin import Kernel
from benchmarks.audit.inspect_kernels import ARCHS

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = ROOT / "benchmarks/audit/kernel_budget.json"
BACKENDS = ("cuda", "triton")
# Registers come in groups of eight per thread; compilers of another version differ by a few.
SLACK = 8
# Instructions of a class: the compiler's own choices move some, a second pass over data many more.
MORE_INSTRUCTIONS = 1.15
Budget = Mapping[str, Any]


def compile_cuda(source: pathlib.Path, arch: str, *flags: str) -> pathlib.Path:
    """A cubin, made again only if a source changed."""
    sys.path.insert(0, str(ROOT / "tests"))  # the compile cache is the tests'
    try:
        from ptx_emulator.nvcc import compile_cached
    finally:
        sys.path.pop(0)
    includes = [f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc/cuda")]
    options = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-cubin", f"-arch={arch}"]
    return compile_cached(source, [*options, *flags, *includes], ".cubin")


@functools.cache
def cuda_kernels(arch: str) -> list[Kernel]:
    """Of the built library, or compiled here where it lacks the architecture."""
    library = inspect_kernels.cuda_library()
    if library is not None and arch in cubin.architectures(library):
        return cubin.inspect(library, arch)
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    return [k for source in sources for k in cubin.inspect(compile_cuda(source, arch), arch)]


def budget_of(kernel: Kernel) -> dict[str, Any]:
    """What the file holds of one kernel."""
    return {
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared": kernel.shared,
        "loads": inspect_kernels.widths(kernel, "global load"),
        "stores": inspect_kernels.widths(kernel, "global store"),
        "occupancy": kernel.occupancy(),
        "instructions": inspect_kernels.instructions(kernel),
    }


def _instructions(text: str) -> dict[str, int]:
    """Of "120 integer 30 float"."""
    return {name: int(number) for number, name in re.findall(r"(\d+) ([a-z]+)", text)}


def _mean_width(widths: str) -> float:
    """Bytes per access of "4x16 2x4"."""
    pairs = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)x(\d+)", widths)]
    total = sum(n for n, _ in pairs)
    return sum(n * width for n, width in pairs) / total if total else 16.0


def worse(name: str, budget: Budget, now: Budget) -> list[str]:
    """Lines that say how `now` exceeds `budget`."""
    lines = []
    for field, slack in (("registers", SLACK), ("spills", 0), ("shared", 0)):
        if now[field] > budget[field] + slack:
            lines.append(f"{name}: {field} {budget[field]} -> {now[field]}")
    for field in ("loads", "stores"):
        # Ten percent: another order of unrolling is no regression, a lost vector is.
        if _mean_width(now[field]) < 0.9 * _mean_width(budget[field]):
            lines.append(f"{name}: {field} {budget[field]} -> {now[field]}")
    # Registers within their slack may cost a block.
    before, after = (1 if b["occupancy"] is None else b["occupancy"] for b in (budget, now))
    if after < 0.8 * before:
        lines.append(f"{name}: occupancy {before:.0%} -> {after:.0%}")
    allowed = _instructions(budget["instructions"])
    for field, number in _instructions(now["instructions"]).items():
        if number > MORE_INSTRUCTIONS * allowed.get(field, 0) + SLACK:
            lines.append(f"{name}: {field} instructions {allowed.get(field, 0)} -> {number}")
    return lines


def compare(
    budgets: Mapping[str, Budget], kernels: Iterable[Kernel], complete: bool = True
) -> list[str]:
    """Regressions, one line each. `complete`: a budget without its kernel is one too."""
    lines, seen = [], set()
    for kernel in kernels:
        seen.add(kernel.name)
        if kernel.name in budgets:
            lines += worse(kernel.name, budgets[kernel.name], budget_of(kernel))
        else:
            lines.append(f"{kernel.name}: no budget; --update writes one")
    if complete:
        lines += [f"{name}: gone; --update drops it" for name in budgets if name not in seen]
    return lines


def load() -> dict[str, dict[str, Budget]]:
    """Budgets by "cuda sm_90" and kernel."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def save(budgets: Mapping[str, Mapping[str, Budget]]) -> None:
    """One kernel a line, so that diffs are read easily."""
    sections = []
    for section in sorted(budgets):
        kernels = budgets[section]
        lines = [f"  {json.dumps(n)}: {json.dumps(kernels[n])}" for n in sorted(kernels)]
        sections.append(f" {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n }")
    FILE.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def _triton_kernels(arch: str) -> list[Kernel]:
    return [inspect_kernels.triton_kernel(n, arch) for n in triton_aot.representative_calls(arch)]


KERNELS: dict[str, Callable[[str], list[Kernel]]] = {
    "cuda": cuda_kernels,
    "triton": _triton_kernels,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit.kernel_budget", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--update", action="store_true", help="write the budget file")
    options = parser.parse_args(argv)
    if cubin.find_cuobjdump() is None:
        print("cuobjdump not found: install the CUDA toolkit or triton", file=sys.stderr)
        return 2
    if "triton" in options.backend and importlib.util.find_spec("triton") is None:
        print("triton is not installed; use --backend cuda", file=sys.stderr)
        return 2
    budgets, regressions = load(), 0
    for backend in options.backend:
        for arch in options.arch:
            section = f"{backend} {arch}"
            kernels = KERNELS[backend](arch)
            lines = compare(budgets.get(section, {}), kernels)
            print(f"{section}: {len(kernels)} kernels, {len(lines)} changes for the worse")
            for line in lines:
                print(f"  {line}")
            regressions += len(lines)
            budgets[section] = {kernel.name: budget_of(kernel) for kernel in kernels}
    if options.update:
        save(budgets)
        print(f"wrote {FILE.relative_to(ROOT)}")
        return 0
    return int(regressions > 0)


if __name__ == "__main__":
    sys.exit(main())
