"""Argument checks that the ops and their references share. Each raises one clear message.

The bindings of compiled kernels check the same things with terse messages. An eager call of such a
kernel runs the checks here only after the binding refused it (`fastdiff.ops._library.Op.call`).
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Collection

import torch
from torch import Tensor

from fastdiff.reference.philox import to_int64

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEBUG = os.environ.get("FASTDIFF_DEBUG", "0") == "1"

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1
# The longest text of a value in a message.
_LONGEST = 200

LARGEST_FLOAT = sys.float_info.max


def shown(value: object) -> str:
    """repr for a message: cut, and without an int of more digits than Python prints."""
    try:
        text = repr(value)
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _dtype_error(op: str, name: str, given: torch.dtype, expected: str) -> TypeError:
    return TypeError(f"{op}: {name} has dtype {given}, expected {expected}")


def check_float(
    op: str, name: str, dtype: torch.dtype, expected: str = "a floating-point dtype"
) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise _dtype_error(op, name, dtype, expected)


def check_device(op: str, name: str, given: torch.device, device: torch.device) -> None:
    if given != device:
        raise ValueError(f"{op}: {name} is on {given}, expected {device} as the main input")


def check_noise_source(
    op: str, noise: Tensor | None, keys: Tensor | None, seed: int | None, *, required: bool
) -> None:
    """At most one source of noise is given; exactly one if it is `required`."""
    sources = (("noise", noise), ("keys", keys), ("seed", seed))
    given = [name for name, value in sources if value is not None]
    if len(given) > 1:
        raise ValueError(f"{op}: {' and '.join(given)} exclude each other")
    if required and not given:
        raise ValueError(f"{op}: pass one of noise, keys, seed")


def check_one_device(x: Tensor, *others: object) -> None:
    """All tensors among `others` are on the device of x.

    For fake kernels: no binding checks the meta tensors that reach them.
    """
    for other in others:
        if isinstance(other, Tensor) and other.device != x.device:
            raise RuntimeError(f"arguments are on {x.device} and {other.device}")


def check_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        given = "None" if x is None else f"a {type(x).__name__}"
        raise TypeError(f"{op}: {name} is {given}, expected a torch.Tensor")
    if x.layout != torch.strided or x.is_nested:
        layout = "is nested" if x.is_nested else f"has layout {x.layout}"
        raise TypeError(f"{op}: {name} {layout}, expected a dense tensor")


def check_flags(op: str, **flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, (bool, torch.SymBool)):
            raise TypeError(f"{op}: {name} is {value!r}, expected True or False")


def check_name(op: str, what: str, name: object, known: Collection[str]) -> None:
    if not isinstance(name, str) or name not in known:
        owner = f"{op}: " if op else ""
        raise ValueError(f"{owner}unknown {what} {shown(name)}; choose from {', '.join(known)}")


def check_position(op: str, name: str, position: int, choices: tuple[str, ...]) -> None:
    """A raw operator has a position in `choices` where the public function has a name."""
    if not 0 <= position < len(choices):
        raise ValueError(f"{op}: {name} is {shown(position)}, expected 0 to {len(choices) - 1}")


def check_per_sample(
    op: str, name: str, x: Tensor, dtype: torch.dtype, batch: int, device: torch.device
) -> None:
    """`x` must be a (batch,) tensor of `dtype` on `device`."""
    check_tensor(op, name, x)
    if x.dtype != dtype:
        raise _dtype_error(op, name, x.dtype, str(dtype))
    if x.dim() != 1 or x.shape[0] != batch:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}, expected ({batch},), one value per sample"
        )
    check_device(op, name, x.device, device)


def check_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """`x` must be floating point with the shape and device of `like`."""
    check_tensor(op, name, x)
    check_float(op, name, x.dtype)
    if x.shape != like.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(like.shape)} as {like_name}"
        )
    check_device(op, name, x.device, like.device)


def check_operand(
    op: str,
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    meaning: str,
    device: torch.device,
) -> None:
    """`x` must be floating point, of `shape` (called `meaning` in the message), on `device`."""
    check_tensor(op, name, x)
    check_float(op, name, x.dtype)
    if x.shape != shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}, expected {meaning} = {tuple(shape)}"
        )
    check_device(op, name, x.device, device)


def check_tables(op: str, device: torch.device, **tables: Tensor) -> int:
    """All tables must be float32 or float64 (T,) of one length on `device`. Returns T."""
    length = None
    for name, table in tables.items():
        check_tensor(op, name, table)
        if table.dtype not in (torch.float32, torch.float64):
            raise _dtype_error(
                op, name, table.dtype, "torch.float32 (half-precision tables lose whole timesteps)"
            )
        if table.dim() != 1:
            raise ValueError(
                f"{op}: {name} has shape {tuple(table.shape)}, expected (T,), one value per "
                "timestep"
            )
        check_device(op, name, table.device, device)
        if length not in (None, table.shape[0]):
            raise ValueError(
                f"{op}: {name} has {table.shape[0]} entries, expected {length} as in the other "
                "tables"
            )
        length = table.shape[0]
    return length


def check_timestep_range(
    op: str, t: Tensor, num: int, name: str = "t", of: str = "length of the tables"
) -> None:
    """0 <= t < num: on the CPU, and with FASTDIFF_DEBUG=1 on CUDA, where the check has to wait."""
    if torch.compiler.is_compiling() or not (t.device.type == "cpu" or DEBUG):
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(t):  # all samples of vmap at once
        t = torch._C._functorch.get_unwrapped(t)
    outside = (t < 0) | (t >= num)
    # A FakeTensor has no values to look at.
    if type(outside) is Tensor and bool(outside.any()):
        raise IndexError(
            f"{op}: {name} has values from {int(t.min())} to {int(t.max())}, "
            f"expected 0 <= {name} < {num}, the {of}"
        )


def split_seed(op: str, seed: int | Tensor | None) -> tuple[Tensor | None, int | None]:
    """`seed` as (keys, None) or (None, signed 64-bit integer)."""
    if seed is None or isinstance(seed, Tensor):
        return seed, None
    return None, as_int64(op, "seed", seed)


def as_int64(op: str, name: str, value: int) -> int:
    """Any Python int, reduced to the signed 64-bit integer with the same low 64 bits."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{op}: {name} is {shown(value)}, expected an int")
        try:
            value = operator.index(value)  # numpy's integers
        except TypeError:  # and its arrays, which have the method too
            raise TypeError(f"{op}: {name} is {shown(value)}, expected an int") from None
    if _INT64_MIN <= value <= _INT64_MAX:
        return value
    return to_int64(value)
