"""Which words of a kernel's parameters may be addresses.

A struct that is passed by value has padding, which holds whatever was there before: the upper half
of an old pointer, say, beside a number of 32 bits. Only what the kernel loads as 64 bits can be an
address.
"""

from __future__ import annotations

import re

from .instructions.instruction import Instruction
from .parser import Function, InstructionText, parse_body, parse_integer

_NAME = re.compile(r"[\w$%]+")
_ADDRESS = re.compile(r"\[\s*([\w$%]+)\s*(?:\+\s*(-?\w+)\s*)?\]")

Place = tuple[str, int]  # a parameter and an offset in it


def address_words(function: Function) -> tuple[int, ...]:
    """Offsets in the parameters of the words of 8 bytes that an entry loads as such.

    Registers with a place in a parameter plus constants are followed. If more than that is done
    with one, as for an array that a variable indexes, all words of the parameter count.
    """
    statements = parse_body(function.body or "")
    texts = [s.text for s in statements if isinstance(s, InstructionText)]
    sizes = {parameter.name: parameter.size for parameter in function.parameters}
    places: dict[str, set[Place]] = {name: {(name, 0)} for name in sizes}
    loaded: set[Place] = set()
    known = 0
    while known < (known := sum(map(len, places.values()))):
        for text in texts:
            if used := places.keys() & set(_NAME.findall(text)):
                loaded |= _follow(Instruction.parse(text), places, used, sizes)
    return tuple(
        p.offset + at
        for p in function.parameters
        for at in range(0, p.size - 7, 8)
        if (p.name, at) in loaded
    )


def _follow(
    ins: Instruction, places: dict[str, set[Place]], used: set[str], sizes: dict[str, int]
) -> set[Place]:
    """What is loaded as 64 bits, where `used` are the names that have places."""
    if ins.opcode == "ld" and (address := _ADDRESS.fullmatch(ins.operands[1])):
        name, offset = address[1], parse_integer(address[2] or "0")
        if offset is not None:
            size = ins.width * ins.vector_length // 8 if ins.width >= 64 else 0
            moved = {(p, at + offset) for p, at in places.get(name, ())}
            return {(p, at + word) for p, at in moved for word in range(0, size, 8)}
    step = parse_integer(ins.operands[2]) if ins.opcode == "add" else 0
    if ins.opcode in ("mov", "cvta", "add") and step is not None and ins.width == 64:
        destination, source = ins.operands[:2]
        moved = {(p, at + step) for p, at in places.get(source, ())}
        near = {(p, at) for p, at in moved if -sizes[p] <= at <= 2 * sizes[p]}
        places.setdefault(destination, set()).update(near)
        return set()
    lost = {p for name in used for p, _ in places[name]}
    return {(p, at) for p in lost for at in range(0, sizes[p], 8)}
