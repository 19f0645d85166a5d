"""Arguments of another type than the signature says: named before they cause an AttributeError."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from torch import Tensor

from fastdiff.reference import checks

_LARGEST = (1 << 63) - 1


def check_type(caller: str, kind: type, **given: object) -> None:
    """Raise a `TypeError` that names the first of the arguments which is no ``kind``."""
    for name, value in given.items():
        if not isinstance(value, kind):
            what = "None" if value is None else f"a {type(value).__name__}"
            expected = "torch.Tensor" if kind is Tensor else kind.__name__
            raise TypeError(f"{caller}: {name} is {what}, expected a {expected}")


def check_tensors(caller: str, **given: object) -> None:
    """Raise a `TypeError` that names the first of the arguments which is no tensor."""
    check_type(caller, Tensor, **given)


def check_ints(least: int, **given: object) -> None:
    """Raise an error that names the first of the arguments which is no int of at least ``least``.

    Raises
    ------
    TypeError
        It is no int.
    ValueError
        It is smaller, or larger than 64 bits hold.
    """
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} is {checks.shown(value)}, expected an int")
        if value < least:
            raise ValueError(f"{name} is {checks.shown(value)}, expected {least} or more")
        if value > _LARGEST:
            raise ValueError(f"{name} is {checks.shown(value)}, expected at most 2**63 - 1")


def check_name(what: str, value: object, known: Collection[str]) -> None:
    """Raise a `ValueError` that lists the known names if ``value`` is none of them."""
    checks.check_name("", what, value, known)


def checked_shape(shape: object) -> tuple[int, ...]:
    """``shape`` as a tuple of at least one int; an error names it."""
    if isinstance(shape, str) or not hasattr(shape, "__iter__"):
        raise TypeError(f"shape is {checks.shown(shape)}, expected a sequence of ints")
    sizes = tuple(shape)
    if not sizes:
        raise ValueError("shape is (), expected (B, ...)")
    for size in sizes:
        check_ints(0, shape=size)
    return sizes
