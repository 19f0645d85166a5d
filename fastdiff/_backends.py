"""Which backends exist here, and which one an op call uses.

Default: CUDA tensors -> cuda if built and built for that GPU, else triton, else reference; CPU
tensors -> cpu if built, else reference. `FASTDIFF_BACKEND` and `use_backend` override; a backend
that was asked for and cannot run the input is an error, never a silent fallback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from fastdiff import _gpus, _native

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


def _runs_nowhere(backend: str) -> str | None:
    """Why none of the GPUs here runs the backend, or None. Asking them initializes CUDA."""
    if backend not in ("cuda", "triton") or (backend == "triton" and triton_interpreted()):
        return None
    reasons = [_why_not(backend, index) for index in range(torch.cuda.device_count())]
    return reasons[0] if reasons and None not in reasons else None


def backends() -> dict[str, BackendStatus]:
    """The backends by name, with `available` and, for those that are not, `reason`.

    Examples
    --------
    >>> import fastdiff
    >>> fastdiff.backends()["reference"].available
    True
    """
    reasons = {name: _missing(name) or _runs_nowhere(name) for name in BACKENDS}
    return {name: BackendStatus(reason is None, reason or "") for name, reason in reasons.items()}


def _problem(name: str, source: str) -> Exception | None:
    """Why `name` cannot be the forced backend, as the error to raise."""
    if name not in BACKENDS:
        return ValueError(f"{source}: unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if (reason := _missing(name)) is not None:
        return RuntimeError(f"{source}: backend {name!r} is not available: {reason}")
    return None


# What runs on CUDA without compiled kernels.
_without_kernels = "triton" if importlib.util.find_spec("triton") else "reference"


def default_without_kernels(device_type: str) -> str:
    """The default backend of "cpu" or "cuda" where there are no compiled kernels."""
    return _without_kernels if device_type == "cuda" else "reference"


def _default_backends() -> dict[str, str]:
    """By device type. Whether the device exists is known once there is a tensor on it."""
    return {
        device_type: device_type
        if _native.load(device_type) is None
        else default_without_kernels(device_type)
        for device_type in ("cpu", "cuda")
    }


# Settled at import: torch.compile traces select_backend and guards on them, and on the ContextVar.
_defaults = _default_backends()
_environment: str | None = os.environ.get("FASTDIFF_BACKEND") or None
_environment_problem = _problem(_environment, "FASTDIFF_BACKEND") if _environment else None

# Of this thread or task: the open blocks of `use_backend`, each a list of its name, and the name of
# the last one. None of them is forgotten if they are closed in another order, as generators may be.
_blocks: ContextVar[tuple[list[str], ...]] = ContextVar("fastdiff.use_backend", default=())
_forced: ContextVar[str | None] = ContextVar("fastdiff backend", default=None)
# Of a block that torch.compile traces, which cannot set a ContextVar: only tracing sees this.
_traced: str | None = None
# The names of the open blocks of all threads, and that of the last one: what torch.compile before
# torch 2.14 guards on, as it cannot read a ContextVar.
_open: dict[int, str] = {}
_latest: str | None = None
# Whether a block was closed where it was not opened, as when another thread ends a generator: then
# whoever opened it still has it, emptied, among their `_blocks`.
_strays = False

if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):
    _forced_here = _forced.get
else:

    def _forced_here() -> str | None:
        return _latest if torch.compiler.is_dynamo_compiling() else _forced.get()


_of_gpus: dict[int, str] = {}


def _of_gpu(index: int) -> str:
    """The default backend on one GPU, which is asked when it first has a tensor."""
    found = _of_gpus.get(index)
    if found is None:
        found = _defaults["cuda"]
        if found == "cuda" and _gpus.why_no_binary(index):
            found = _without_kernels
        if found == "triton" and _gpus.why_no_triton(index):
            found = "reference"
        _of_gpus[index] = found
    return found


def _why_not(backend: str, index: int) -> str | None:
    """Why one GPU does not run the kernels of "cuda" or "triton"."""
    return _gpus.why_no_binary(index) if backend == "cuda" else _gpus.why_no_triton(index)


# What torch.compiler.assume_constant_result does, which would load Dynamo.
for _function in (_of_gpu, _runs_nowhere, _why_not):
    _function._dynamo_marked_constant = True


def default_backend(device_type: str | torch.device) -> str:
    """The backend that ops on "cpu", "cuda", "cuda:1", ... tensors use when none is asked for.

    Raises
    ------
    TypeError
        Neither a string nor a torch.device.
    """
    if not isinstance(device_type, (str, torch.device)):
        raise TypeError(
            f"device_type is {type(device_type).__name__}, expected a string such as 'cuda'"
        )
    device_type = str(device_type)
    if not device_type.startswith("cuda"):
        return _defaults.get(device_type, "reference")
    if not torch.cuda.is_available():
        return _defaults["cuda"]
    index = torch.device(device_type).index
    return _of_gpu(torch.cuda.current_device() if index is None else index)


def forced_backend() -> str | None:
    """The backend that a block of `use_backend` asks for here; None outside of them."""
    return _forced_here()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every fastdiff op of this thread or asyncio task inside the `with` block on one backend.

    Other threads and tasks keep theirs; a task that is created inside the block, and a thread that
    runs in `contextvars.copy_context()`, start with this one. The backward pass of an op runs on
    the backend of its forward pass, wherever it is called. Compiled code follows the block too;
    before torch 2.14, which does not tell threads apart there, the last block of any thread.

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
    if (problem := _problem(name, "use_backend")) is not None:
        raise problem
    if (reason := _runs_nowhere(name)) is not None:
        raise RuntimeError(f"use_backend: backend {name!r} is not available: {reason}")
    if torch.compiler.is_dynamo_compiling():
        global _traced
        outer = _traced
        _traced = name
        try:
            yield
        finally:
            _traced = outer
        return
    block, opened_by = [name], _thread_and_task()
    _set_blocks((*_blocks.get(), block))
    _open[id(block)] = name
    _set_latest()
    try:
        yield
    finally:
        del _open[id(block)]
        _set_latest()
        _set_blocks(tuple(other for other in _blocks.get() if other is not block))
        if _thread_and_task() != opened_by:
            global _strays
            _strays = True
            block.clear()  # for who opened it


def _thread_and_task() -> tuple[int, object]:
    asyncio = sys.modules.get("asyncio")
    running = asyncio is not None and asyncio._get_running_loop() is not None
    return threading.get_ident(), asyncio.current_task() if running else None


def _set_blocks(blocks: tuple[list[str], ...]) -> None:
    _blocks.set(blocks)
    _forced.set(next((block[0] for block in reversed(blocks) if block), None))


def _set_latest() -> None:
    """Until what was set is what is open: another thread may have come between, and no lock can be
    taken, as generators with blocks are ended wherever Python collects garbage."""
    global _latest
    names = None
    while names != (names := tuple(_open.values())):
        _latest = names[-1] if names else None


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
    forced = _traced or _forced_here()
    if forced is not None and _strays and not torch.compiler.is_dynamo_compiling():
        _set_blocks(tuple(block for block in _blocks.get() if block))
        forced = _forced_here()
    if forced is None:
        forced = _environment
        if forced is None:
            if unsupported is not None:
                return "reference"
            if x.is_cpu:  # the cheapest test
                return _defaults["cpu"]
            return _of_gpu(x.device.index) if x.device.type == "cuda" else "reference"
        if _environment_problem is not None:
            raise _environment_problem
    if forced == "reference":
        return forced
    home = ("cpu" if triton_interpreted() else "cuda") if forced == "triton" else forced
    if unsupported is None and x.device.type != home:
        unsupported = f"it runs on {home} tensors, these are on {x.device.type}"
    if unsupported is None and home == "cuda":
        unsupported = _why_not(forced, x.device.index)
    if unsupported is not None:
        raise RuntimeError(f"{op}: backend {forced!r} was asked for, but {unsupported}")
    return forced
