"""Integer instructions as Python computes them."""

from __future__ import annotations

from .exact import MASK32, signed
from .instruction_cases import (
    FIELD_TRIPLES,
    INTEGER_PAIRS,
    INTEGER_TRIPLES,
    INTEGERS,
    LONG_PAIRS,
    Case,
)


def _permute(a, b, control):
    source = b << 32 | a
    result = 0
    for i in range(4):
        selector = control >> (4 * i) & 15
        byte = source >> (8 * (selector & 7)) & 255
        if selector & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << (8 * i)
    return result


def _bit_field(is_signed):
    def reference(a, position, length):
        position &= 255
        length &= 255
        fill = a >> min(position + length - 1, 31) & 1 if is_signed and length else 0
        bits = [
            a >> (position + i) & 1 if i < length and position + i <= 31 else fill
            for i in range(32)
        ]
        return sum(bit << i for i, bit in enumerate(bits))

    return reference


def _leading_bit(a):
    return (~a & MASK32 if a >> 31 else a).bit_length() - 1


def integer_cases() -> list[Case]:
    two, three = "b32 b32 b32", "b32 b32 b32 b32"
    s = signed
    pairs = {
        "mul.hi.u32": lambda a, b: a * b >> 32,
        "mul.hi.s32": lambda a, b: s(a) * s(b) >> 32,
        "shl.b32": lambda a, b: a << b if b < 32 else 0,
        "shr.s32": lambda a, b: s(a) >> min(b, 31),
        "shr.u32": lambda a, b: a >> b if b < 32 else 0,
        "add.sat.s32": lambda a, b: max(min(s(a) + s(b), 2**31 - 1), -(2**31)),
    }
    triples = {
        "mad.lo.s32": lambda a, b, c: a * b + c,
        "mad.hi.u32": lambda a, b, c: (a * b >> 32) + c,
        "shf.l.wrap.b32": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
        "shf.r.clamp.b32": lambda a, b, c: (b << 32 | a) >> min(c, 32),
        "shf.l.clamp.b32": lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32,
        "prmt.b32": _permute,
        "sad.s32": lambda a, b, c: c + abs(s(a) - s(b)),
    }
    cases = [Case(n, two, f"{n} D,A,B;", r, INTEGER_PAIRS) for n, r in pairs.items()]
    cases += [Case(n, three, f"{n} D,A,B,C;", r, INTEGER_TRIPLES) for n, r in triples.items()]
    cases += [
        Case(f"bfe.{t}", three, f"bfe.{t} D,A,B,C;", _bit_field(t == "s32"), FIELD_TRIPLES)
        for t in ("u32", "s32")
    ]
    return cases + _more_integer_cases()


def _more_integer_cases() -> list[Case]:
    one, two, three = "b32 b32", "b32 b32 b32", "b32 b32 b32 b32"
    s = signed
    return [
        Case(
            "lop3 majority",
            three,
            "lop3.b32 D,A,B,C,0xE8;",
            lambda a, b, c: a & b | a & c | b & c,
            INTEGER_TRIPLES,
        ),
        Case(
            "mul.wide.s32",
            "b64 b32 b32",
            "mul.wide.s32 D,A,B;",
            lambda a, b: s(a) * s(b),
            INTEGER_PAIRS,
        ),
        Case(
            "mul.hi.s64",
            "b64 b64 b64",
            "mul.hi.s64 D,A,B;",
            lambda a, b: s(a, 64) * s(b, 64) >> 64,
            LONG_PAIRS,
        ),
        Case(
            "add.cc addc",
            two,
            "add.cc.u32 t0,A,B; addc.u32 D,0,0;",
            lambda a, b: a + b >> 32,
            INTEGER_PAIRS,
        ),
        Case(
            "sub.cc subc",
            two,
            "sub.cc.u32 t0,A,B; subc.u32 D,0,0;",
            lambda a, b: -(a < b),
            INTEGER_PAIRS,
        ),
        Case(
            "mad.lo.cc madc.hi",
            three,
            "mad.lo.cc.u32 t0,A,B,C; madc.hi.u32 D,A,B,0;",
            lambda a, b, c: a * b + c >> 32,
            INTEGER_TRIPLES,
        ),
        Case(
            "neg max",
            one,
            "neg.s32 t0,A; max.s32 D,A,t0;",
            lambda a: max(s(a), s(-a)),
            INTEGERS,
        ),
        Case("bfind.s32", one, "bfind.s32 D,A;", _leading_bit, INTEGERS),
        Case(
            "bfind.shiftamt",
            one,
            "bfind.shiftamt.u32 D,A;",
            lambda a: 32 - a.bit_length() if a else MASK32,
            INTEGERS,
        ),
        Case(
            "cvt.sat.u8.s32",
            one,
            "cvt.sat.u8.s32 D,A;",
            lambda a: max(0, min(255, s(a))),
            INTEGERS,
        ),
        Case(
            "cvt.sat.s8.s32",
            one,
            "cvt.sat.s8.s32 D,A;",
            lambda a: max(-128, min(127, s(a))),
            INTEGERS,
        ),
        Case("cvt.s32.s8", one, "cvt.s32.s8 D,A;", lambda a: s(a, 8), INTEGERS),
        Case(
            "szext.wrap.s32",
            two,
            "szext.wrap.s32 D,A,B;",
            lambda a, b: s(a, b & 31) if b & 31 else 0,
            INTEGER_PAIRS,
        ),
        Case(
            "bmsk.clamp.b32",
            two,
            "bmsk.clamp.b32 D,A,B;",
            lambda a, b: ((1 << min(b, 32)) - 1) << a if a < 32 else 0,
            INTEGER_PAIRS,
        ),
    ]
