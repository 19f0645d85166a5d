"""The CPU kernels on ARM: compiled by the distribution's cross compiler, run under qemu.

    python tests/aarch64.py

Needs Debian's g++-aarch64-linux-gnu and qemu-user, and a C++ compiler. Every case of
benchmarks/audit/instructions.cpp runs as aarch64 and as this machine's portable code, which the
tests compare with float64; exits with 1 if two results differ by more than two compilers may.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLAGS = [
    *("-std=c++20", "-O3", "-static", "-fopenmp-simd"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", f"-I{ROOT / 'csrc/include'}"),
]
# One compiler fuses multiplications and additions where the other does not: a rounding or so per
# operation. The longest chain of a kernel is some 30 operations, a sum over 4096 elements in lanes
# 12 more levels; relative to the largest value of the output, as terms cancel.
OPERATIONS = 64
UNITS = {"fp32": 2**-24, "bf16": 2**-8}  # of rounding to the dtype, twice: each side its own

Results = dict[str, list[tuple[str, torch.Tensor]]]


def results(compiler: str, folder: pathlib.Path, *runner: str) -> Results:
    """What the kernels compute, by case: dtype and values of each output."""
    driver, written = folder / "driver", folder / "results"
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    sources.append(ROOT / "benchmarks/audit/instructions.cpp")
    subprocess.run([compiler, *FLAGS, *sources, "-o", driver], check=True)
    environment = os.environ | {"FASTDIFF_CPU_ISA": "portable"}
    subprocess.run([*runner, driver, "--results", written], env=environment, check=True)
    found: Results = {}
    for line in written.read_text().splitlines():
        if not line.startswith(" "):
            found[name := line] = []
            continue
        dtype, count, *values = line.split()
        assert int(count) == len(values), f"{name}: {len(values)} values of {count}"
        found[name].append((dtype, torch.tensor([float(v) for v in values], dtype=torch.float64)))
    return found


def main() -> int:
    needed = ("aarch64-linux-gnu-g++", "qemu-aarch64")
    if missing := [name for name in needed if shutil.which(name) is None]:
        print(f"not on the PATH: {', '.join(missing)} (g++-aarch64-linux-gnu, qemu-user)")
        return 2
    with tempfile.TemporaryDirectory() as arm, tempfile.TemporaryDirectory() as here:
        theirs = results("aarch64-linux-gnu-g++", pathlib.Path(arm), "qemu-aarch64")
        ours = results(os.environ.get("CXX", "c++").split()[-1], pathlib.Path(here))
    assert ours.keys() == theirs.keys()
    failed = outputs = 0
    for name in ours:
        for (dtype, a), (_, b) in zip(ours[name], theirs[name], strict=True):
            outputs += 1
            largest = a.abs().max().item()
            bound = OPERATIONS * UNITS["fp32"] * largest
            if dtype == "bf16":
                bound += 2 * UNITS["bf16"] * largest
            error = (a - b).abs().max().item()
            # A kernel that computes nothing agrees with itself.
            if not (math.isfinite(largest) and largest > 0 and error <= bound):
                failed += 1
                print(f"{name}: they differ by {error:.3g}, allowed {bound:.3g} of {largest:.3g}")
    print(f"aarch64: {outputs} outputs of {len(ours)} cases, {failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
