"""Mutation score: swap an operator of a kernel's source, run that kernel's tests, see if they fail.

    cd tests && python -m mutations.score [--seed 0] [--sample 40] [--start 20] [--file q_sample]

The mutants are a random sample of all operators of csrc/include and triton_kernels. Killed are
those with which a test fails or a kernel does not end; mutants that do not compile are not counted.
What survives is printed, for docs/verification.md to explain.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .project_copy import ROOT, Outcome, ProjectCopy

SWAPS = {
    " + ": " - ",
    " - ": " + ",
    " * ": " / ",
    " / ": " * ",
    " % ": " / ",
    " < ": " <= ",
    " <= ": " < ",
    " > ": " >= ",
    " >= ": " > ",
    " == ": " != ",
    " != ": " == ",
    " && ": " || ",
    " || ": " && ",
    " & ": " | ",
    " | ": " & ",
    " ^ ": " & ",
    " << ": " >> ",
    " >> ": " << ",
    " += ": " -= ",
    " -= ": " += ",
    "min(": "max(",
    "max(": "min(",
    "fminf(": "fmaxf(",
    "fmaxf(": "fminf(",
    "minimum(": "maximum(",
    "maximum(": "minimum(",
}
_OPERATOR = re.compile("|".join(map(re.escape, sorted(SWAPS, key=len, reverse=True))))
# Comments, strings, preprocessor lines and what the compiler checks by itself.
_NOT_CODE = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|^\s*#[^\n]*|\bstatic_assert\([^;]*;|\basm\b[^;]*;',
    re.M | re.S,
)
CUDA, TRITON = "cuda-ptx", "triton-ptx"
# The quick tests of a source file, by the longest stem that begins its name; a file that several
# ops include has those of one that uses all of it. Files that are not named are left out: sigmoid.h
# is for the CPU library, which a mutant would have to build.
TESTS = {
    "ddim_step": ("ddim_step",),
    "ddpm_step": ("ddpm_step",),
    "elementwise": ("q_sample",),
    "eps_loss": ("eps_loss",),
    "group_norm_silu": ("group_norm_silu", "group_norm_silu_cuda"),
    "cluster": ("group_norm_silu_cuda",),
    "layout": ("q_sample",),
    "model_heads": ("ddpm_step", "vlb_terms"),
    "_layout": ("q_sample",),
    "normal_tail": ("vlb_terms",),
    "philox": ("philox_normal",),
    "q_sample": ("q_sample", "posterior_mean"),
    "reduce": ("eps_loss",),
    "sampler_step": ("ddim_step", "ddpm_step"),
    "vector_io": ("q_sample",),
    "vlb_terms": ("vlb_terms",),
}
TRITON_TESTS = TESTS | {"group_norm_silu": ("group_norm_silu", "group_norm_silu_triton")}
TIMEOUT = 300.0  # seconds; the longest of these commands takes two minutes on an idle core


@dataclass(frozen=True)
class Site:
    """One operator: what stands at `offset` of `file`."""

    file: str
    offset: int
    operator: str

    def describe(self) -> str:
        text = (ROOT / self.file).read_text()
        line = text.count("\n", 0, self.offset) + 1
        source = text.splitlines()[line - 1].strip()
        new = SWAPS[self.operator].strip()
        return f"{self.file}:{line}: {self.operator.strip()} -> {new}: {source}"


def _code(path: pathlib.Path) -> str:
    """The text with everything that is not code blanked out, offsets unchanged."""
    text = path.read_text()

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", "\0", found[0])

    if path.suffix != ".py":
        return _NOT_CODE.sub(blank, text)
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    code = list(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            begin = starts[token.start[0] - 1] + token.start[1]
            end = starts[token.end[0] - 1] + token.end[1]
            code[begin:end] = "\0" * (end - begin)
    return re.sub(r"^(def|from|import) .*$|\w+: [^=\n]* \| None", blank, "".join(code), flags=re.M)


def sites() -> Iterator[Site]:
    """All operators, in the order of the files."""
    for path in sorted([*ROOT.glob("csrc/include/fastdiff/*"), *ROOT.glob("triton_kernels/*.py")]):
        file = str(path.relative_to(ROOT))
        if _stem(file) is not None:
            for found in _OPERATOR.finditer(_code(path)):
                yield Site(file, found.start(), found[0])


def _stem(file: str) -> str | None:
    stem = pathlib.Path(file).stem
    found = [name for name in TESTS if stem.startswith(name)]
    return max(found, key=len) if found else None


def tests(file: str) -> list[str]:
    """pytest's arguments that test `file`."""
    triton = file.startswith("triton_kernels")
    names = (TRITON_TESTS if triton else TESTS)[_stem(file)]
    expression = TRITON if triton else f"{CUDA} or test_choice or test_every_plan"
    if file.endswith("_plan.cuh"):
        names = (*names, "group_norm_silu_plan")
    return [*(f"tests/ops/test_{name}.py" for name in names), "-k", expression]


def _run(project: ProjectCopy, file: str) -> Outcome:
    try:
        return project.run(*tests(file), timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return Outcome(1, "no end")


def _verdict(outcome: Outcome) -> str:
    if outcome.code == 0:
        return "survived"
    invalid = ("CompileError", "CompilationError", "SyntaxError")
    return "invalid" if any(error in outcome.output for error in invalid) else "killed"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the random sample")
    parser.add_argument("--sample", type=int, default=40, metavar="N", help="mutants to try")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="skip the first N")
    parser.add_argument("--file", default="", metavar="TEXT", help="only files containing this")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    options = parser.parse_args(argv)
    everything = [site for site in sites() if options.file in site.file]
    if not everything:
        parser.error(f"--file is {options.file!r}, which no kernel source contains")
    number = min(options.sample, len(everything))
    # In random order, so that a run that was cut short is a sample too.
    sample = random.Random(options.seed).sample(everything, number)
    print(f"{number} of {len(everything)} operators, seed {options.seed}", flush=True)
    verdicts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        project = None if options.list else ProjectCopy(pathlib.Path(folder))
        passing: set[tuple[str, ...]] = set()
        for site in sample[options.start :]:
            if project is None:
                print(site.describe())
                continue
            command = tuple(tests(site.file))
            if command not in passing:
                outcome = _run(project, site.file)
                assert outcome.code == 0, f"fails without a mutant: {outcome.output[-3000:]}"
                passing.add(command)
            path = project.folder / site.file
            text = path.read_text()
            end = site.offset + len(site.operator)
            path.write_text(text[: site.offset] + SWAPS[site.operator] + text[end:])
            verdict = _verdict(_run(project, site.file))
            project.restore(site.file)
            verdicts[verdict] += 1
            print(f"{verdict:8}  {site.describe()}", flush=True)
    valid = verdicts["killed"] + verdicts["survived"]
    if valid:
        share = verdicts["killed"] / valid
        print(
            f"{verdicts['killed']} of {valid} killed ({share:.0%}), {verdicts['invalid']} invalid"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
