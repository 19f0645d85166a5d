"""The innermost loops of a kernel's machine code, by instructions per element.

    python -m benchmarks.audit.loops [--arch sm_90 ...] [--kernel group_norm_silu_fwd]

Of kernels whose accesses have 16 bytes. What a step of a loop is about is told by its accesses: one
that stores vectors writes results, one with copies to shared memory brings elements there, one that
only reads vectors adds up. Sums of a backward pass have two special functions per element (a
sigmoid's exponential and reciprocal); other sums have a read for each vector.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.audit import cubin, inspect_kernels

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.MULTILINE
)
_BACK = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Loop:
    """One innermost loop: `role` is "copy", "sums" or "results", `elements` those of a step."""

    role: str
    instructions: int
    elements: int

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements


def innermost(code: str) -> list[list[str]]:
    """Opcodes of every loop of one function that has no other in it."""
    lines = [(int(m[1], 16), m[2], m[3]) for m in _LINE.finditer(code)]
    lines = [line for line in lines if line[1] != "NOP"]
    spans = []
    for address, opcode, operands in lines:
        target = _BACK.search(operands) if opcode.split(".")[0] == "BRA" else None
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[op for at, op, _ in lines if begin <= at <= end] for begin, end in inner]


def describe(opcodes: Sequence[str], element_size: int, tensors: int) -> Loop | None:
    """None: no loop over vectors. `tensors`: read by the kernel."""
    wide: Counter[str] = Counter()
    for opcode in opcodes:
        stem, *modifiers = opcode.split(".")
        if "128" in modifiers:
            wide[stem] += 1
    vector, size = 16 // element_size, len(opcodes)
    if stores := wide["STG"]:
        return Loop("results", size, vector * stores)
    if copies := wide["LDGSTS"]:
        return Loop("copy", size, vector * copies // tensors)
    special = sum(opcode.startswith("MUFU") for opcode in opcodes)
    if tensors > 1:
        return Loop("sums", size, special // 2) if special else None
    reads = wide["LDS"] + wide["LDG"]
    return Loop("sums", size, vector * reads) if reads else None


def main_loops(code: str, element_size: int, tensors: int) -> dict[str, Loop]:
    """Of each role the loop of the widest step; of equal ones the longer, with the activation."""
    best: dict[str, Loop] = {}
    for opcodes in innermost(code):
        loop = describe(opcodes, element_size, tensors)
        if loop is None:
            continue
        known = best.get(loop.role)
        if known is None or (loop.elements, loop.instructions) > (
            known.elements,
            known.instructions,
        ):
            best[loop.role] = loop
    return best


def functions(library: str, arch: str) -> dict[str, str]:
    """Short name -> machine code of every kernel of a library or cubin."""
    command = [str(cubin.find_cuobjdump()), "-arch", arch, "-sass", library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(
        re.findall(r"^\s+Function : (\S+)\n(.*?)(?=^\s+Function : |\Z)", text, re.M | re.S)
    )
    return dict(zip(cubin.demangle(list(found)), found.values(), strict=True))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit.loops", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--arch", nargs="+", default=inspect_kernels.ARCHS, metavar="ARCH")
    parser.add_argument("--kernel", default="group_norm_silu", help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    library = inspect_kernels.cuda_library()
    if library is None or cubin.find_cuobjdump() is None:
        print("needs the built CUDA library and cuobjdump", file=sys.stderr)
        return 2
    sizes = {"bf16": 2, "fp16": 2, "fp32": 4}
    for arch in options.arch:
        for name, code in sorted(functions(str(library), arch).items()):
            match = re.fullmatch(r"(\w+)<(\w+),.*,(\d+)>", name)
            if options.kernel not in name or match is None or match[2] not in sizes:
                continue
            loops = main_loops(code, sizes[match[2]], 2 if "bwd" in name else 1)
            text = ", ".join(
                f"{role} {loop.per_element:.1f} (step {loop.elements})"
                for role, loop in sorted(loops.items())
            )
            total = sum(loop.per_element for loop in loops.values())
            print(f"{arch} {name}: {total:.1f} per element: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
