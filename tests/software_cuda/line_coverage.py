"""Which lines of the GPU path the GPU suite reaches on the software device.

    python -m tests.software_cuda.line_coverage --out FOLDER
    python -m tests.software_cuda.line_coverage --out FOLDER PYTEST_ARGUMENT ...

gcov counts the lines of csrc/bindings and of the host code in csrc/cuda, coverage.py (`pip install
coverage`, 7.10 or newer) those lines of fastdiff/ and triton_kernels/ that run only where there is
a device (device_lines.py). Tests with made-up devices, which need none, count too. Prints tables
with the lines that were not reached; the exit code is 1 if a test fails or fewer than 98 % of the
lines are reached. FOLDER keeps a copy of the project and the counts: a second run, of the tests
that are named, adds to them.
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

from software_cuda.device_lines import device_lines

_COMPILED = ("csrc/bindings/", "csrc/cuda/")
LEAST = 0.98
# The copy of the project has no docs, which other tests read.
ON_A_DEVICE = (
    ("gpu and not slow", "tests/gpu", "tests/ops", "tests/samplers", "tests/test_out_of_memory.py"),
    # Triton's split kernels are compiled by slow tests only.
    ("gpu and slow", "tests/gpu/test_group_norm_silu_plans.py", "-k", "test_triton and split"),
)
MADE_UP_DEVICES = ("tests/test_backends.py", "tests/training/test_precision.py")
MADE_UP_DEVICES += ("tests/ops/test_triton_launch.py",)
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


def python_lines(settings: Path, root: Path) -> Lines:
    """Those that need a device."""
    coverage = [sys.executable, "-m", "coverage"]
    rcfile = f"--rcfile={settings}"
    subprocess.run([*coverage, "combine", "-q", "--append", rcfile], cwd=root, check=True)
    command = [*coverage, "json", rcfile, "-q", "-o", "-"]
    text = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    found: Lines = {}
    for name, file in json.loads(text)["files"].items():
        path = root / name
        name = str(path.relative_to(root))
        ran = dict.fromkeys(file["missing_lines"], False)
        ran |= dict.fromkeys(file["executed_lines"], True)
        wanted = device_lines(name, path.read_text())
        if kept := {number: ran[number] for number in ran if number in wanted}:
            found[name] = kept
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


def share(lines: Lines) -> tuple[int, int]:
    """Lines that were reached, and all."""
    ran = [reached for seen in lines.values() for reached in seen.values()]
    return sum(ran), len(ran)


def table(lines: Lines) -> str:
    rows = ["| file | lines | reached | not reached |", "|---|---|---|---|"]
    for name, seen in [*sorted(lines.items()), ("together", {})]:
        reached, number = share({name: seen} if seen else lines)
        missing = ranges([line for line, ran in seen.items() if not ran])
        rows.append(f"| `{name}` | {number} | {reached / number:.1%} | {missing} |")
    return "\n".join(rows).replace("`together`", "together")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="all other arguments are pytest's: the tests to run instead",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the counts")
    parser.add_argument("--device", default="sm_90,devices=2", help="as for --software-cuda")
    options, tests = parser.parse_known_args()
    folder = options.out.resolve()
    root = folder / "project"
    settings = folder / "coverage.ini"
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
    settings.write_text(
        f"[run]\nsource = {root}/fastdiff, {root}/triton_kernels\n"
        f"data_file = {folder}/python.coverage\nparallel = true\npatch = subprocess\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "SOFTWARE_CUDA_COVERAGE": str(folder / "objects"),
    }
    device = f"--software-cuda={options.device}"
    runs = [[device, "-m", *selection] for selection in ON_A_DEVICE] + [[*MADE_UP_DEVICES]]
    if tests:
        runs = [[device, "-m", "gpu", *tests]]
    code = 0
    for arguments in runs:
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest"]
        command += ["-n", "0", "-q", *arguments]
        code |= subprocess.run(command, cwd=root, env=environment, check=False).returncode
    parts = compiled_lines(folder, root), python_lines(settings, root)
    for lines in parts:
        print(table(lines))
    too_few = any(reached < LEAST * number for reached, number in map(share, parts))
    return code or too_few


if __name__ == "__main__":
    sys.exit(main())
