"""Bytes that a thread asks memory for before it waits, read from machine code.

By Little's law a multiprocessor reaches a share of the bandwidth only with enough bytes under way:
bandwidth times latency. A thread's share are the loads that it issues before the first instruction
that uses one of their results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.audit import cubin

_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.MULTILINE
)
_REGISTER = re.compile(r"\bR(\d+)\b")
_LOAD = re.compile(r"LDG?\b")


@dataclass(frozen=True)
class InFlight:
    """`bytes`: of a thread's loads to registers; `copies`: it has asynchronous ones to shared
    memory, which wait for nothing but the memory that they fill."""

    bytes: int
    copies: bool


def instructions(text: str) -> list[tuple[str, str]]:
    """(opcode with modifiers, operands) of a listing by cuobjdump."""
    return _LINE.findall(text)


def width(opcode: str) -> int:
    """Bytes per thread."""
    return next((cubin.WIDTHS[m] for m in opcode.split(".")[1:] if m in cubin.WIDTHS), 4)


def in_flight(code: Iterable[tuple[str, str]]) -> InFlight:
    """The most bytes that are on their way at one place of the code, in the order of its text."""
    pending: list[tuple[range, int]] = []
    most, copies = 0, False
    for opcode, operands in code:
        name = opcode.partition(".")[0]
        copies |= name in ("LDGSTS", "UBLKCP", "UTMALDG")
        registers = [int(n) for n in _REGISTER.findall(operands)]
        written = registers[:1] if re.match(r"\s*R\d", operands) and name[:2] != "ST" else []
        read = registers[len(written) :]
        # Results arrive in order: who waits for one has those before it.
        waits = [i for i, (loaded, _) in enumerate(pending) if any(r in loaded for r in read)]
        if waits:
            del pending[: waits[-1] + 1]
        if _LOAD.fullmatch(name) and written:
            size = width(opcode)
            pending.append((range(written[0], written[0] + max(1, size // 4)), size))
            most = max(most, sum(size for _, size in pending))
    return InFlight(most, copies)
