"""Arguments of another type than the signature says: named before they cause an AttributeError."""

from __future__ import annotations

from torch import Tensor


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
