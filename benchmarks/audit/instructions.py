"""Instructions of the CPU kernels against a committed budget: the performance gate without a clock.

    python -m benchmarks.audit.instructions [--update]

Needs valgrind and the objects of the native build; a few seconds. Every kernel runs once on a small
shape under callgrind, whose counts repeat exactly. Prints what needs more instructions than the
budget and its tolerance, or has none, and exits with 1. --update writes what is counted now to
benchmarks/audit/instruction_budget.json; review that diff like code.

Valgrind knows no AVX-512 and hides it from the program, so the AVX2 code is what is counted. It is
compiled from the same loops; those written with AVX-512 intrinsics are not covered. Counts say
nothing of cache misses: a kernel that reads its memory in a worse order passes.

The GPU kernels have the same kind of gate in two parts. Bytes counted in the emulator: the tests
`pytest tests/ops -k traffic`; registers, spills and access widths:
`python -m benchmarks.audit.kernel_budget`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastdiff import _native

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = ROOT / "benchmarks/audit/instruction_budget.json"
SOURCE = ROOT / "benchmarks/audit/instructions.cpp"
OBJECTS = ROOT / "build" / f"native-{sysconfig.get_platform()}"
TOLERANCE = 0.02
# Another compiler, or another version of it, makes other code of the same source.
OTHER_COMPILER = 0.25
REPAIR = "python -m benchmarks.audit.instructions --update accepts them"


class CannotCountError(RuntimeError):
    """Something that counting needs is not here; the message says what."""


@dataclass(frozen=True)
class Counts:
    """Instructions per case, and what they are counts of."""

    compiler: str
    isa: str
    instructions: Mapping[str, int]

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=1) + "\n"


def load(path: pathlib.Path = FILE) -> Counts:
    return Counts(**json.loads(path.read_text()))


def kernel_objects() -> list[pathlib.Path]:
    """The compiled CPU kernels.

    Raises
    ------
    CannotCountError
        They were not built here, or a source is newer.
    """
    objects = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        found = OBJECTS / f"cpu_{source.stem}.o"
        if not found.exists() or found.stat().st_mtime < source.stat().st_mtime:
            raise CannotCountError(
                f"csrc/cpu/{source.name} is not built: run `python setup.py build_ext --inplace`"
            )
        objects.append(found)
    return objects


def compile_flags() -> list[str]:
    """What the native build compiled its objects with."""
    text = (OBJECTS / "build.ninja").read_text()
    return shlex.split(re.search(r"^cxxflags = (.*)$", text, re.MULTILINE)[1])


def find_compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise CannotCountError("no C++ compiler is on the PATH")


def build_driver(objects: Sequence[pathlib.Path], target: pathlib.Path) -> pathlib.Path:
    """Link the driver, which only calls, with the objects that are counted."""
    caller = OBJECTS / "instructions.o"
    inputs = [SOURCE, *(ROOT / "csrc/include").rglob("*.h"), *(ROOT / "csrc/cpu").glob("*.h")]
    cxx = find_compiler()
    if not caller.exists() or caller.stat().st_mtime < max(i.stat().st_mtime for i in inputs):
        include = f"-I{ROOT / 'csrc/include'}"
        with tempfile.TemporaryDirectory() as folder:  # two test processes may be here at once
            made = pathlib.Path(folder) / "made.o"
            command = [cxx, "-std=c++20", "-O1", "-Wall", include, "-c", SOURCE, "-o", made]
            subprocess.run(command, check=True)
            shutil.copy(made, partial := caller.with_suffix(f".{os.getpid()}"))
            partial.replace(caller)
    subprocess.run([cxx, caller, *objects, "-o", target], check=True)
    return target


def count(objects: Sequence[pathlib.Path], *options: str, only: str = "") -> Counts:
    """Run the driver under callgrind, for the cases whose name begins with `only`.

    Raises
    ------
    CannotCountError
        valgrind is not installed, or cannot run the kernels.
    """
    if shutil.which("valgrind") is None:
        raise CannotCountError("valgrind is not on the PATH (its package is called valgrind)")
    with tempfile.TemporaryDirectory() as folder:
        driver = build_driver(objects, pathlib.Path(folder) / "driver")
        listed = subprocess.run([driver], capture_output=True, text=True, check=True).stdout
        names = [name for name in listed.splitlines()[1:] if name.startswith(only)]
        out = pathlib.Path(folder) / "out"
        command = ["valgrind", "--tool=callgrind", "--toggle-collect=measured"]
        command += ["--dump-after=measured", f"--callgrind-out-file={out}"]
        done = subprocess.run(
            [*command, driver, *options, *names], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CannotCountError(f"valgrind failed: {done.stderr.strip().splitlines()[-1]}")
        totals = {
            name: int(re.search(r"^summary: (\d+)", text, re.MULTILINE)[1])
            for index, name in enumerate(names, 1)
            for text in [out.with_name(f"out.{index}").read_text()]
        }
    isa = done.stdout.splitlines()[0]
    return Counts(_native.build_info().compiler, isa, totals)


def compare(budget: Counts, now: Counts, complete: bool = True) -> list[str]:
    """Lines that say what needs more than the budget; `complete`: or is gone.

    Raises
    ------
    CannotCountError
        The counts are of another instruction set.
    """
    if now.isa != budget.isa:
        raise CannotCountError(f"the budget is for {budget.isa}, this is {now.isa}")
    tolerance = TOLERANCE if now.compiler == budget.compiler else OTHER_COMPILER
    lines = []
    for name, found in now.instructions.items():
        allowed = budget.instructions.get(name)
        if allowed is None:
            lines.append(f"{name}: no budget")
        elif found > allowed * (1 + tolerance):
            more = found / allowed - 1
            lines.append(f"{name}: {allowed} -> {found} instructions (+{more:.0%})")
    gone = budget.instructions.keys() - now.instructions.keys() if complete else ()
    return lines + [f"{name}: gone; --update drops it" for name in sorted(gone)]


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a kernel exceeds its budget, 2 if nothing can be counted here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit.instructions", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--update", action="store_true", help="write what is counted now")
    options = parser.parse_args(argv)
    try:
        now = count(kernel_objects())
        if options.update:
            FILE.write_text(now.to_json())
            print(f"{len(now.instructions)} counts written to {FILE.name}")
            return 0
        budget = load()
        lines = compare(budget, now)
    except CannotCountError as reason:
        print(f"not counted: {reason}")
        return 2
    if now.compiler != budget.compiler:
        print(f"built by {now.compiler}, the budget by {budget.compiler}: +{OTHER_COMPILER:.0%}")
    if lines:
        print("more instructions than the budget:\n  " + "\n  ".join(lines) + f"\n{REPAIR}")
        return 1
    print(f"{len(now.instructions)} kernels within {TOLERANCE:.0%} of their budget ({now.isa})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
