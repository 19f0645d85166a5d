"""Defines ops in the `fastdiff` namespace and registers what the C++ libraries do not.

Every op has one schema and up to two overloads: the default one, whose CPU and CUDA kernels are
the compiled ones where the libraries are built (else Triton's, else the reference), and `.triton`,
which always runs the Triton kernel. They are defined with `torch.library.Library` rather than
`custom_op` because a call costs half as much.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from fastdiff import _native

# Kept alive for the process: dropping a Library undoes its registrations.
_library = torch.library.Library("fastdiff", "FRAGMENT")


class below_autograd:
    """Calls inside go straight to the device kernels: for inputs that need no gradient.

    The Python kernel at the Autograd key costs some microseconds even when it has nothing to do.
    """

    __slots__ = ("_guard",)

    def __enter__(self) -> None:
        self._guard = torch._C._AutoDispatchBelowAutograd()

    def __exit__(self, *_: object) -> None:
        del self._guard


def define(
    name: str,
    signature: str,
    *,
    fake: Callable,
    autograd: Callable | None,
    reference: Callable,
    triton: Callable,
) -> None:
    """Define `fastdiff::name` and `fastdiff::name.triton`.

    Parameters
    ----------
    signature
        The schema from its opening parenthesis on.
    fake
        Shape, dtype and stride propagation.
    autograd
        `autograd(overload, *args)`, the kernel at the Autograd key; None for an op whose output
        never needs a gradient.
    reference, triton
        Implementations with the schema's arguments, used where no compiled kernel is.
    """
    overloads = {
        "": _default_kernels(reference, triton),
        ".triton": {"CPU": triton, "CUDA": triton},
    }
    for overload, kernels in overloads.items():
        _library.define(f"{name}{overload}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"{name}{overload}"
        for key, kernel in kernels.items():
            _library.impl(qualified, kernel, key)
        torch.library.register_fake(f"fastdiff::{qualified}", fake, lib=_library)
        if autograd is not None:
            packet = getattr(torch.ops.fastdiff, name)
            op = getattr(packet, overload[1:] or "default")
            _library.impl(qualified, _bind(autograd, op), "Autograd")


def _bind(autograd: Callable, op: Callable) -> Callable:
    def autograd_kernel(*args: object, **kwargs: object) -> object:
        return autograd(op, *args, **kwargs)

    return autograd_kernel


def _default_kernels(reference: Callable, triton: Callable) -> dict[str, Callable]:
    """Python kernels for the device keys that no compiled library serves."""
    kernels = {}
    if _native.load("cpu") is not None:
        kernels["CPU"] = reference
    if _native.load("cuda") is not None:
        has_triton = importlib.util.find_spec("triton") is not None
        kernels["CUDA"] = triton if has_triton else reference
    return kernels
