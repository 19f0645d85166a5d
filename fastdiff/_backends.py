"""Which backends exist here, and which one an op call uses.

Default: CUDA tensors -> cuda if built, else triton, else reference; CPU tensors -> cpu if built,
else reference. `FASTDIFF_BACKEND` and `use_backend` override; a backend that was asked for and
cannot run the input is an error, never a silent fallback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastdiff import _native

BACKENDS = ("reference", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used on this machine; `reason` says why not."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _missing(backend: str) -> str | None:
    """Why `backend` cannot be used here, or None."""
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed"
        if triton_interpreted() or torch.cuda.is_available():
            return None
        return "no CUDA device is visible (TRITON_INTERPRET=1 runs it, slowly, on CPU tensors)"
    reason = _native.load(backend)
    if reason is None and backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    return reason


def backends() -> dict[str, BackendStatus]:
    """The backends by name, with `available` and, for those that are not, `reason`.

    Examples
    --------
    >>> import fastdiff
    >>> fastdiff.backends()["reference"].available
    True
    """
    reasons = {name: _missing(name) for name in BACKENDS}
    return {name: BackendStatus(reason is None, reason or "") for name, reason in reasons.items()}


def _problem(name: str, source: str) -> Exception | None:
    """Why `name` cannot be the forced backend, as the error to raise."""
    if name not in BACKENDS:
        return ValueError(f"{source}: unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if (reason := _missing(name)) is not None:
        return RuntimeError(f"{source}: backend {name!r} is not available: {reason}")
    return None


def _default_backends() -> dict[str, str]:
    """By device type; whether there is a device at all is known once there is a tensor on it."""
    cuda_kernels = _native.load("cuda") is None
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "cpu": "cpu" if _native.load("cpu") is None else "reference",
        "cuda": "cuda" if cuda_kernels else "triton" if has_triton else "reference",
    }


# Plain globals, settled at import: torch.compile traces select_backend and guards on them.
_defaults = _default_backends()
_forced: str | None = os.environ.get("FASTDIFF_BACKEND") or None
_forced_problem = _problem(_forced, "FASTDIFF_BACKEND") if _forced else None


def default_backend(device_type: str) -> str:
    """The backend that ops on "cpu", "cuda", ... tensors use when none is asked for."""
    return _defaults.get(device_type, "reference")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every fastdiff op inside the `with` block on one backend (process-wide, not per thread).

    Parameters
    ----------
    name
        "reference", "cpu", "cuda" or "triton".

    Raises
    ------
    ValueError
        Unknown name.
    RuntimeError
        The backend is not available here. An op inside the block that the backend cannot run
        raises too.
    """
    global _forced, _forced_problem
    if (problem := _problem(name, "use_backend")) is not None:
        raise problem
    previous = _forced, _forced_problem
    _forced, _forced_problem = name, None
    try:
        yield
    finally:
        _forced, _forced_problem = previous


def select_backend(op: str, x: torch.Tensor, unsupported: str | None) -> str:
    """The backend for one call of `op`.

    Parameters
    ----------
    x
        A tensor on the device of the call.
    unsupported
        Why no kernel (other than the reference) can run this input; None if they can.

    Raises
    ------
    ValueError, RuntimeError
        The backend that was asked for does not exist, or cannot run this input.
    """
    if _forced is None:
        if unsupported is not None:
            return "reference"
        return default_backend("cpu" if x.is_cpu else x.device.type)  # the test is the cheaper
    if _forced_problem is not None:
        raise _forced_problem
    if _forced == "reference":
        return _forced
    home = ("cpu" if triton_interpreted() else "cuda") if _forced == "triton" else _forced
    if unsupported is None and x.device.type != home:
        unsupported = f"it runs on {home} tensors, these are on {x.device.type}"
    if unsupported is not None:
        raise RuntimeError(f"{op}: backend {_forced!r} was asked for, but {unsupported}")
    return _forced
