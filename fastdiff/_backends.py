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


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if (reason := _missing(name)) is not None:
        raise RuntimeError(f"{source}: backend {name!r} is not available: {reason}")
    return name


# A plain global rather than a context variable: torch.compile can guard on it.
_forced: str | None = None
_environment_read = False


def forced_backend() -> str | None:
    """The backend that `use_backend` or FASTDIFF_BACKEND asks for, or None."""
    global _forced, _environment_read
    if not _environment_read:
        if name := os.environ.get("FASTDIFF_BACKEND"):
            _forced = _validated(name, "FASTDIFF_BACKEND")
        _environment_read = True
    return _forced


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
    global _forced
    previous = forced_backend()
    _forced = _validated(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def default_backend(device_type: str) -> str:
    """The backend that tensors on `device_type` use when none is asked for."""
    if device_type == "cpu":
        return "cpu" if _missing("cpu") is None else "reference"
    if device_type == "cuda":
        return next((b for b in ("cuda", "triton") if _missing(b) is None), "reference")
    return "reference"


_defaults: dict[str, str] = {}


def select_backend(op: str, device_type: str, unsupported: str | None) -> str:
    """The backend for one call of `op` on tensors of `device_type`.

    Parameters
    ----------
    unsupported
        Why no kernel (other than the reference) can run this input; None if they can.

    Raises
    ------
    RuntimeError
        The backend that was asked for cannot run this input.
    """
    forced = _forced if _environment_read else forced_backend()
    if forced is None:
        if unsupported is not None:
            return "reference"
        if device_type not in _defaults:
            _defaults[device_type] = default_backend(device_type)
        return _defaults[device_type]
    if forced == "reference":
        return forced
    home = ("cpu" if triton_interpreted() else "cuda") if forced == "triton" else forced
    if unsupported is None and device_type != home:
        unsupported = f"it runs on {home} tensors, these are on {device_type}"
    if unsupported is not None:
        raise RuntimeError(f"{op}: backend {forced!r} was asked for, but {unsupported}")
    return forced
