"""One instruction on edge values: how a case is run and checked, and the values."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import run
from .exact import double_bits, float_bits, same_float

_NUMPY_TYPES = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
_random = random.Random(2)

_FLOAT_EDGES = """
    00000000 80000000 3f800000 bf800000 7f800000 ff800000 7fc00000 00000001 80000001 007fffff
    7f7fffff 4f000000 cf000000 4effffff 3f000000 3fc00000 40200000 bf000000 477fe000 477fefff
    477ff000 33800000 33000000 33000001 387fc000 3f808000 3f818000 3f807fff 7f7f8000 43e00000
    43e80000 43e80001 3b000000 4f800000 c2c80000
"""
FLOATS = [int(text, 16) for text in _FLOAT_EDGES.split()]
FLOATS += [_random.getrandbits(32) for _ in range(60)]
FLOATS += [float_bits(_random.gauss(0, 10 ** _random.uniform(-6, 6))) for _ in range(160)]

INTEGERS = [0, 1, 2, 31, 32, 33, 63, 64, 127, 128, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
INTEGERS += [0xFFFFFFFE, 0x55555555, 0x12345678]
INTEGERS += [_random.getrandbits(_random.randint(1, 32)) for _ in range(239)]

LONGS = [(v * v * 3 + v) % 2**64 for v in INTEGERS]
DOUBLES = [double_bits(_random.gauss(0, 10 ** _random.uniform(-50, 45))) for _ in range(200)]
DOUBLES += [double_bits(x) for x in (0.0, -0.0, math.inf, -math.inf, math.nan, 1e39, -1e39, 1e-46)]


def _tuples(values: Sequence[int], arity: int, count: int) -> list[tuple[int, ...]]:
    return [tuple(_random.choice(values) for _ in range(arity)) for _ in range(count)]


FLOAT_PAIRS = _tuples(FLOATS, 2, 500)
FLOAT_TRIPLES = _tuples(FLOATS, 3, 600)
INTEGER_PAIRS = _tuples(INTEGERS, 2, 700)
INTEGER_TRIPLES = _tuples(INTEGERS, 3, 700)
LONG_PAIRS = [(_random.getrandbits(64), _random.getrandbits(64)) for _ in range(300)]
HALF_TRIPLES = [tuple(_random.getrandbits(16) for _ in range(3)) for _ in range(1000)]
HALF_PAIRS = [triple[:2] for triple in HALF_TRIPLES]
FIELD_TRIPLES = [
    (
        _random.choice(INTEGERS),
        _random.choice([0, 1, 5, 16, 31, 32, 40, 255, _random.randint(0, 31)]),
        _random.choice([0, 1, 3, 8, 31, 32, 33, 255, _random.randint(0, 32)]),
    )
    for _ in range(600)
]


@dataclass
class Case:
    """`code` computes D from A, B, C; `types` are those of D, A, B, C.

    `decode` makes the result comparable as a float, otherwise bits are compared.
    """

    name: str
    types: str
    code: str
    reference: Callable
    inputs: Sequence
    decode: Callable[[int], float] | None = None


def kernel_for(case: Case) -> str:
    """A kernel that applies the code to element tid of each input array."""
    result_type, *source_types = case.types.split()
    sources = range(len(source_types))
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(source_types) + 1))
    registers = [f".reg .{t} %in{i};" for i, t in enumerate(source_types)]
    loads = []
    for i, source_type in enumerate(source_types):
        size = int(source_type[1:]) // 8
        loads.append(f"mul.wide.u32 %rd9, %r0, {size}; add.s64 %rd9, %rd9, %rd{i + 1};")
        loads.append(f"ld.global.{source_type} %in{i}, [%rd9];")
    code = case.code.replace("D", "%out")
    for i, letter in zip(sources, "ABC", strict=False):
        code = code.replace(letter, f"%in{i}")
    result_size = int(result_type[1:]) // 8
    return "\n".join(
        [
            ".version 8.0\n.target sm_90\n.address_size 64",
            f".visible .entry k({parameters}) {{",
            ".reg .b64 %rd<10>; .reg .b32 %r<4>; .reg .pred %p<4>; .reg .b32 t<8>;",
            f".reg .{result_type} %out;",
            *registers,
            *(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(len(source_types) + 1)),
            "mov.u32 %r0, %tid.x;",
            *loads,
            code,
            f"mul.wide.u32 %rd9, %r0, {result_size}; add.s64 %rd9, %rd9, %rd0;",
            f"st.global.{result_type} [%rd9], %out; ret; }}",
        ]
    )


def check(case: Case) -> None:
    result_type, *source_types = case.types.split()
    rows = [v if isinstance(v, tuple) else (v,) for v in case.inputs][:1024]
    arrays = [
        np.array([row[i] for row in rows], _NUMPY_TYPES[source_type])
        for i, source_type in enumerate(source_types)
    ]
    result = np.zeros(len(rows), _NUMPY_TYPES[result_type])
    run(kernel_for(case), "k", [result, *arrays], 1, len(rows))
    wrong = []
    for row, bits in zip(rows, result.tolist(), strict=True):
        expected = case.reference(*row)
        if case.decode:
            good = same_float(expected, case.decode(bits))
        else:
            good = expected % (1 << int(result_type[1:])) == bits
        if not good:
            wrong.append(f"{[hex(x) for x in row]}: want {expected}, got {bits:#x}")
    assert not wrong, f"{len(wrong)} of {len(rows)} wrong, such as {wrong[:3]}"
