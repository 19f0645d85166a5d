"""Which lines of the GPU path the GPU suite reaches on the software device.

    python -m tests.software_cuda.line_coverage --out FOLDER [PYTEST ARGUMENT ...]

gcov counts the lines of csrc/bindings and of the host code in csrc/cuda, coverage.py (`pip install
coverage`) those of fastdiff/ and triton_kernels/. Prints a table with the lines that were not
reached. FOLDER keeps a copy of the project and the counts: two runs with different arguments add
up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from mutations.project_copy import ROOT as PROJECT
from mutations.project_copy import ProjectCopy
from ptx_emulator.compile import host_compiler

_COMPILED = ("csrc/bindings/", "csrc/cuda/")
# Python files that hold the CUDA branches; the others run the same lines on a CPU.
_PYTHON = ("fastdiff/ops/", "fastdiff/_backends", "fastdiff/_native", "triton_kernels/")
# The copy of the project has no docs, which other tests read.
WITH_GPU_TESTS = ["tests/gpu", "tests/ops", "tests/samplers", "tests/test_out_of_memory.py"]
Lines = dict[str, dict[int, bool]]  # by file: whether a line ran


def compiled_lines(folder: Path, root: Path) -> Lines:
    """Of the objects in `folder`, whichever instance of a template a line ran in.

    Those of the CPU library are left out: the bindings' headers are instantiated there too, in
    lines that no CUDA tensor meets.
    """
    found: Lines = defaultdict(dict)
    for counts in sorted(folder.glob("**/*.gcda")):
        if counts.name.startswith(("cpu_", "bindings_cpu")):
            continue
        command = ["gcov", "--json-format", "--stdout", str(counts)]
        text = subprocess.run(
            command, cwd=counts.parent, capture_output=True, text=True, check=True
        ).stdout
        for file in json.loads(text)["files"]:
            path = Path(file["file"])
            path = path.relative_to(root) if path.is_relative_to(root) else path
            if not str(path).startswith(_COMPILED):
                continue
            seen = found[str(path)]
            for line in file["lines"]:
                number = line["line_number"]
                seen[number] = seen.get(number, False) or line["count"] > 0
    return found


def python_lines(data: Path, root: Path) -> Lines:
    command = [sys.executable, "-m", "coverage", "json", "--data-file", str(data), "-q", "-o", "-"]
    text = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    found: Lines = {}
    for name, file in json.loads(text)["files"].items():
        path = Path(name)
        path = path.relative_to(root) if path.is_absolute() else path
        found[str(path)] = {
            **dict.fromkeys(file["missing_lines"], False),
            **dict.fromkeys(file["executed_lines"], True),
        }
    return found


def ranges(numbers: list[int]) -> str:
    """Such as 3-5, 9."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)


def table(lines: Lines) -> str:
    rows = ["| file | lines | reached | not reached |", "|---|---|---|---|"]
    for name, seen in sorted(lines.items()):
        missing = [number for number, ran in seen.items() if not ran]
        share = 1 - len(missing) / len(seen) if seen else 1
        rows.append(f"| `{name}` | {len(seen)} | {share:.1%} | {ranges(missing)} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="all other arguments are pytest's"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the counts")
    parser.add_argument("--device", default="sm_90,devices=2", help="as for --software-cuda")
    options, tests = parser.parse_known_args()
    folder = options.out.resolve()
    root = folder / "project"
    data = folder / "python.coverage"
    if not root.exists():
        root.mkdir(parents=True)
        ProjectCopy(root)
        # Both the compiler's and the linker's flag. The build's own prefix map would make the paths
        # of the counts relative to wherever a process ends.
        build = {
            **os.environ,
            "FASTDIFF_BUILD": "cpu",
            "CXX": f"{host_compiler()} --coverage",
            "CXXFLAGS": f"-O0 -ffile-prefix-map={root}/={root}/",
        }
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=root, env=build, check=True)
        for library in PROJECT.glob("fastdiff/_C_cuda.so"):  # replaced when it is loaded
            shutil.copy(library, root / "fastdiff")
    (folder / "objects").mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "SOFTWARE_CUDA_COVERAGE": str(folder / "objects"),
        "COVERAGE_FILE": str(data),
    }
    command = [sys.executable, "-m", "coverage", "run", "--append"]
    command += ["--source=fastdiff,triton_kernels", "-m", "pytest", "-n", "0", "-q", "-m", "gpu"]
    command += [f"--software-cuda={options.device}", *tests]
    if not any(Path(argument.partition("::")[0]).exists() for argument in tests):
        command += WITH_GPU_TESTS
    code = subprocess.run(command, cwd=root, env=environment, check=False).returncode
    lines = compiled_lines(folder, root)
    lines |= {n: s for n, s in python_lines(data, root).items() if n.startswith(_PYTHON)}
    print(table(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
