"""Which words of a kernel's parameters may be addresses.

A struct that is passed by value has padding, which holds whatever was there before: the upper half
of an old pointer, say, beside a number of 32 bits. Only what the kernel loads as 64 bits can be an
address.
"""

from __future__ import annotations

import re

from .parser import Function

_WORD = re.compile(r"[\w$%]+")
_LOAD = re.compile(
    r"\bld(?:\.volatile)?\.param(?:::entry)?(?:\.v(?P<count>\d))?\.[a-z]+(?P<bits>\d+)"
    r"\s[^\[]*\[\s*(?P<name>[\w$%]+)\s*(?:\+\s*(?P<offset>\d+)\s*)?\]\s*$"
)


def address_words(function: Function) -> tuple[int, ...]:
    """Offsets in the parameters of the words of 8 bytes that an entry loads as such.

    All words of a parameter whose address is computed, as for an array indexed by a variable.
    """
    parameters = {parameter.name: parameter for parameter in function.parameters}
    found: set[int] = set()
    for text in (function.body or "").split(";"):
        for name in parameters.keys() & set(_WORD.findall(text)):
            parameter, load = parameters[name], _LOAD.search(text)
            begin, end = 0, parameter.size
            if load and load["name"] == name:
                begin = int(load["offset"] or 0)
                end = begin + int(load["count"] or 1) * int(load["bits"]) // 8
                if int(load["bits"]) < 64:
                    continue
            found |= {parameter.offset + at for at in range(begin, end - 7, 8)}
    return tuple(sorted(found))
