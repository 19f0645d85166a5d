"""Which words of a kernel's parameters may be addresses."""

from __future__ import annotations

import pytest

from .. import Program
from .support import needs_nvcc, ptx_of

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


def words(ptx: str, entry: str | None = None) -> list[int]:
    program = Program(ptx)
    return list(program.address_words(program.find_entry(entry)))


@needs_nvcc
@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("members", [0, 8, 24]),  # a bool and an int in between
        ("copied", [0, 8, 24]),  # passed on to a function by value
        ("pairs", [0, 16]),
        ("scalars", [0, 16]),  # an int before the second pointer
        ("constant_index", [8]),
        ("variable_index", [0, 8, 16]),  # the padding behind the array too
    ],
)
def test_compiled_kernels(kernel, expected):
    assert words(ptx_of("parameter_words", "sm_80"), kernel) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("ld.param.v2.u64 {%a, %b}, [p];", [0, 8]),
        ("ld.param.v2.b32 {%c, %d}, [p+8];", []),
        ("ld.param::entry.b64 %a, [ p + 16 ];", [16]),
        ("@%q ld.param.s64 %a, [p+24];", [24]),
        ("$L: ld.param.b64 %a, [p];", [0]),
        ("mov.b64 %a, p; ld.param.b64 %b, [%a+8]; ld.param.b32 %c, [%a+4];", [8]),
        ("mov.b64 %a, p; cvta.param.u64 %b, %a; ld.b64 %a, [%b+16];", [16]),
        ("mov.b64 %a, p; add.s64 %b, %a, 24; ld.param.v2.b64 {%b, %a}, [%b+-16];", [8, 16]),
        ("mov.b64 %a, p; $L: ld.param.b64 %b, [%a]; add.s64 %a, %a, 16; bra $L;", [0, 16]),
        ("mov.b64 %a, p; add.s64 %b, %a, %b; ld.param.b32 %c, [%b];", [0, 8, 16, 24]),
        ("mov.b64 %a, p; selp.b64 %b, %a, %b, %q;", [0, 8, 16, 24]),
        ("mov.b64 %a, p; st.param.b64 [q], %a;", [0, 8, 16, 24]),
        ("mov.u64 %a, pq; ld.param.b64 %b, [n];", [32]),  # another name
        ("ld.param.u32 %c, [n]; st.global.b64 [%a], %b;", []),
    ],
)
def test_loads(body, expected):
    parameters = ".param .align 8 .b8 p[32], .param .u64 n"
    declarations = ".reg .b64 %a, %b; .reg .b32 %c, %d; .reg .pred %q;"
    ptx = f"{HEADER}.visible .entry k({parameters}) {{ {declarations} {body} ret; }}"
    assert words(ptx) == expected
