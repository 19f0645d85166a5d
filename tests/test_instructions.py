"""The instruction budget of the CPU kernels: held by them, and broken by slower ones."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.audit import instructions
from benchmarks.audit.instructions import CannotCountError, Counts

BUDGET = Counts("compiler 1", "AVX2", {"a fp32": 1000, "b fp32": 2000})


@pytest.fixture(scope="module")
def objects() -> list[pathlib.Path]:
    try:
        return instructions.kernel_objects()
    except CannotCountError as reason:
        pytest.skip(str(reason))


def counted(*arguments, **options) -> Counts:
    try:
        return instructions.count(*arguments, **options)
    except CannotCountError as reason:
        pytest.skip(str(reason))


def test_the_kernels_keep_their_budget(objects) -> None:
    try:
        lines = instructions.compare(instructions.load(), counted(objects))
    except CannotCountError as reason:  # of another instruction set
        pytest.skip(str(reason))
    assert not lines, "\n".join([*lines, instructions.REPAIR])


def test_counts_repeat_exactly_and_a_second_call_doubles_them(objects) -> None:
    only = "eps_loss_backward"
    once, again = counted(objects, only=only), counted(objects, only=only)
    assert once == again
    twice = counted(objects, "--again", only=only)
    for name, number in twice.instructions.items():
        assert number == pytest.approx(2 * once.instructions[name], rel=0.01)


def test_every_loop_is_vectorized() -> None:
    """A loop that the compiler left scalar, which a budget written from it would not show.

    Of every function that is compiled for AVX2, the vector instructions on all eight lanes against
    the scalar arithmetic, of which ends of loops have some.
    """
    library = instructions.ROOT / "fastdiff/_C_cpu.so"
    objdump = shutil.which("objdump")
    if not library.exists() or objdump is None or platform.machine() != "x86_64":
        pytest.skip("needs the CPU library, for x86-64, and objdump")
    command = [objdump, "-d", "-C", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loops = re.findall(r"^[0-9a-f]+ <(.*Clones<.*::avx2\(.*)>:\n((?:.+\n)+)", text, re.MULTILINE)
    assert len(loops) > 50
    scalar = {
        name
        for name, code in loops
        if code.count("ymm")
        < 0.1 * len(re.findall(r"\tv?(?:add|sub|mul|div|sqrt|fn?m)\w*ss ", code))
        or "ymm" not in code
    }
    assert not scalar


SLOWER = {
    "a second pass over the data": (
        ("noised(a, b, x0, noise, result, n);", "noised(a, b, x0, noise, result, n);" * 2),
        (),
    ),
    "a scalar loop": (
        ("#pragma omp simd", ""),
        ("-fno-tree-vectorize", "-fno-tree-slp-vectorize"),
    ),
}


@pytest.mark.parametrize("slower", SLOWER)
def test_a_slower_kernel_breaks_the_budget(slower: str, objects, tmp_path) -> None:
    (old, new), flags = SLOWER[slower]
    source = instructions.ROOT / "csrc/cpu/q_sample.cpp"
    assert old in source.read_text()
    planted = tmp_path / "q_sample.cpp"
    planted.write_text(source.read_text().replace(old, new))
    target = tmp_path / "q_sample.o"
    command = [instructions.find_compiler(), *instructions.compile_flags(), *flags]
    command += [f"-I{source.parent}", "-c", planted, "-o", target]
    subprocess.run(command, check=True)
    changed = [target if o.name == "cpu_q_sample.o" else o for o in objects]
    right = counted(objects, only="q_sample given fp32")
    lines = instructions.compare(right, counted(changed, only="q_sample given fp32"))
    assert [line.partition(":")[0] for line in lines] == list(right.instructions)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"a fp32": 1020, "b fp32": 1}, []),
        ({"a fp32": 1021, "b fp32": 2000}, ["a fp32: 1000 -> 1021 instructions (+2%)"]),
        ({"a fp32": 1000}, ["b fp32: gone; --update drops it"]),
        ({**BUDGET.instructions, "c": 1}, ["c: no budget"]),
    ],
)
def test_what_exceeds_a_budget(now, expected) -> None:
    assert instructions.compare(BUDGET, dataclasses.replace(BUDGET, instructions=now)) == expected


def test_another_compiler_gets_a_looser_bound_and_another_instruction_set_none() -> None:
    now = dataclasses.replace(BUDGET, compiler="2", instructions={"a fp32": 1249, "b fp32": 2501})
    (line,) = instructions.compare(BUDGET, now)
    assert line.startswith("b fp32: 2000 -> 2501")
    with pytest.raises(CannotCountError, match="budget is for AVX2, this is AVX-512"):
        instructions.compare(BUDGET, dataclasses.replace(BUDGET, isa="AVX-512"))


def test_command(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(instructions, "FILE", tmp_path / "budget.json")
    monkeypatch.setattr(instructions, "load", lambda: BUDGET)
    monkeypatch.setattr(instructions, "kernel_objects", list)
    now = [BUDGET]
    monkeypatch.setattr(instructions, "count", lambda objects: now[0])
    assert instructions.main([]) == 0
    assert instructions.main(["--update"]) == 0
    assert Counts(**json.loads(instructions.FILE.read_text())) == BUDGET
    now[0] = dataclasses.replace(BUDGET, compiler="2", instructions={"a fp32": 1, "b fp32": 9999})
    assert instructions.main([]) == 1
    printed = capsys.readouterr().out
    assert "built by 2, the budget by compiler 1: +25%" in printed
    assert instructions.REPAIR in printed

    def unable(objects):
        raise CannotCountError("valgrind is not on the PATH")

    monkeypatch.setattr(instructions, "count", unable)
    assert instructions.main([]) == 2
    assert "not counted: valgrind is not on the PATH" in capsys.readouterr().out
