"""What machine instructions (SASS) a PTX instruction becomes, and which pipe executes them.

From what ptxas makes for compute capabilities 8.0 to 10.0; fractions are means.
"""

from __future__ import annotations

import functools
import re

# The pipes of a multiprocessor, each with a throughput of its own, and all instructions together.
# fma: float32 arithmetic; imad: integer multiplications, in the same pipe at half the rate from
# 8.6 on; alu: integer, logic, comparison; xu: special functions and slow conversions; lsu: loads,
# stores and shuffles, in passes of 128 bytes.
PIPES = ("fma", "imad", "alu", "xu", "lsu")
ISSUE = "issue"
_PASS_BYTES = 128  # that shared memory and the L1 cache move at a time

GUARD = re.compile(r"^@!?%?\w+\s+")
_OPCODE = re.compile(r"([a-z][a-z0-9_]*)((?:[.:]+[a-z0-9_]+)*)", re.IGNORECASE)
_FLOAT_TYPES = ("f32", "f16", "bf16", "f16x2", "bf16x2")
_WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_NOTHING = ("cvta", "ret", "pragma", "neg")  # become operands, modifiers or the end of a kernel


def _of(**pipes: float) -> dict[str, float]:
    """Every machine instruction takes one issue slot."""
    return {ISSUE: sum(pipes.values()), **pipes}


@functools.cache
def expand(text: str) -> dict[str, float]:
    """The machine instructions of one PTX instruction, by pipe, and their sum, "issue"."""
    text = GUARD.sub("", text.strip())
    match = _OPCODE.match(text)
    if match is None:
        return {}
    name, modifiers = match[1], match[2].replace("::", ".").strip(".").split(".")
    rest = text[match.end() :]
    types = [m for m in modifiers if re.fullmatch(r"[subf]\d+(x2)?|bf16(x2)?|pred", m)]
    wide = "64" in "".join(types[-1:])
    if name in _NOTHING:
        return {}
    if name in ("ld", "ldu", "st", "atom", "red", "cp", "ldmatrix", "stmatrix"):
        return _memory(name, modifiers, types, rest)
    if name in ("shfl", "vote", "match", "redux", "activemask", "elect"):
        return _of(lsu=1.0) if name in ("shfl", "match", "redux") else _of(alu=1.0)
    if name in ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"):
        return _special(name, modifiers)
    if name == "div":
        return _division(modifiers, rest)
    if name == "rem":
        return _of(alu=45.0, imad=24.0, xu=1.0) if wide else _of(alu=12.0, imad=6.0, xu=2.0)
    if name == "cvt":
        return _conversion(types)
    if name == "mov":
        return _move(rest)
    if types[:1] == ["f32x2"] or "f32x2" in types:
        return {ISSUE: 1.0, "fma": 2.0}  # one instruction, both halves in turn
    if name in ("bra", "brx"):
        # Branches around a few instructions become predicates.
        return _of(alu=0.4) if "uni" in modifiers else _of(alu=0.9)
    if name in ("mul", "mad", "mul24", "mad24") and types[:1] and types[0][0] in "us":
        return _of(imad=4.0) if wide and "wide" not in modifiers else _of(imad=1.0)
    if name in ("add", "sub", "mul", "fma", "mad") and types and types[0] in _FLOAT_TYPES:
        return _of(fma=1.0)
    if "f64" in types:
        return _of(fma=1.0)
    if name in ("shl", "shr"):
        return _of(alu=1.5 if wide else 1.0)
    if name in ("add", "sub", "and", "or", "xor", "setp", "min", "max", "selp", "not", "abs"):
        return _of(alu=2.0 if wide else 1.0)
    return _of(alu=1.0)  # prmt, lop3, bfe, popc, bar, membar, mapa, ...


def _memory(name: str, modifiers: list[str], types: list[str], rest: str) -> dict[str, float]:
    if "param" in modifiers:
        return _of(alu=0.15)  # most are operands in the constant bank
    if name == "cp":
        size = re.search(r",\s*(\d+)", rest.partition("]")[2].partition("]")[2])
        if "commit_group" in modifiers or "wait_group" in modifiers or "wait_all" in modifiers:
            return _of(alu=1.0)
        return {ISSUE: 1.0, "lsu": 2 * 32 * (int(size[1]) if size else 16) / _PASS_BYTES}
    width = _WIDTHS.get(re.sub(r"^\D+", "", types[-1]) if types else "32", 4)
    count = next((n for m, n in _VECTORS.items() if m in modifiers), 1)
    passes = max(1.0, 32 * width * count / _PASS_BYTES)
    return {ISSUE: max(1.0, width * count / 16), "lsu": passes}


def _special(name: str, modifiers: list[str]) -> dict[str, float]:
    if name == "tanh" or "ftz" in modifiers or name in ("sin", "cos"):
        # sine and cosine scale their argument first
        return _of(xu=1.0, fma=1.0) if name in ("sin", "cos") else _of(xu=1.0)
    if "approx" in modifiers:  # denormals: compare, scale, and scale back
        return _of(xu=1.0, fma=1.0, alu=2.0) if name == "lg2" else _of(xu=1.0, fma=2.0, alu=1.0)
    return _of(xu=1.0, fma=5.0, alu=3.0)  # correctly rounded: Newton steps and a slow path


def _division(modifiers: list[str], rest: str) -> dict[str, float]:
    if "f64" in modifiers:
        return _of(fma=12.0, xu=1.0, alu=4.0)
    if "f32" in modifiers:
        if "rn" in modifiers:
            return _of(fma=6.0, xu=1.0, alu=3.0)
        if "0f3F800000" in rest:
            return _of(xu=1.0)
        return _of(fma=2.0, xu=1.0, alu=2.0)
    wide = any("64" in m for m in modifiers)
    return _of(alu=45.0, imad=24.0, xu=1.0) if wide else _of(alu=12.0, imad=6.0, xu=2.0)


def _conversion(types: list[str]) -> dict[str, float]:
    if len(types) < 2:
        return _of(alu=1.0)
    to, source = types[0], types[1]
    if {to[0], source[0]} <= {"u", "s", "b"}:
        return _of(alu=0.3) if "64" in to + source else _of(alu=1.0)
    if source == "f16":
        return _of(fma=1.0)  # an addition of half precision with a wide result
    if to[0] in "us" and source.startswith("f"):
        return _of(xu=1.0)
    return _of(alu=1.0)  # packed conversions, bfloat16, integer to float


def _move(rest: str) -> dict[str, float]:
    destination, _, source = rest.partition(",")
    if "{" in source and "{" not in destination:
        return _of(alu=1.0)  # packs two halves
    return _of(alu=1.0) if re.match(r"\s*%(tid|ctaid|ntid|laneid|clock|cluster)", source) else {}


# Opcode -> pipe, the first that fits (NVIDIA, "CUDA Binary Utilities", instruction set reference).
_PIPES_OF_SASS = {
    "fma": r"F(ADD|MUL|FMA)(2|32I)?|H(ADD|MUL|FMA)2.*|D(ADD|MUL|FMA)",
    "imad": r"IMAD|XMAD|IMUL",
    "xu": r"MUFU|F2I|I2F|F2F|FRND|POPC|FLO|BREV",
    "lsu": r"(LD|ST)[GSL]?|LDGSTS|LDSM|STSM|SHFL|REDUX|MATCH|ATOM[GS]?|RED[G]?",
}


def sass_pipe(opcode: str) -> str:
    """The pipe of a machine instruction such as FFMA or LDG.E.128; control flow counts as alu."""
    name = opcode.partition(".")[0]
    if name == "IMAD" and re.search(r"\.(MOV|U32|SHL|IADD)\b", opcode):
        return "fma"  # moves and shifts that the compiler gives to that pipe, at its full rate
    return next((p for p, fits in _PIPES_OF_SASS.items() if re.fullmatch(fits, name)), "alu")
