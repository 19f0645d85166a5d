"""One place through which every Triton kernel is launched.

The tests replace `launch` to run the same launchers' kernels as compiled PTX on the CPU.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

CLUSTER_BLOCKS = 8  # that every GPU with clusters allows


def compiles_clusters(version: str) -> bool:
    """Whether this Triton can add up over the blocks of a cluster: 3.7 fails to compile it."""
    return tuple(map(int, version.split(".")[:2])) >= (3, 8)


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). Outside of kernels triton.cdiv looks at the environment: 3 to 8 us."""
    return -(-a // b)


def is_nvidia(device: torch.device) -> bool:
    """ROCm's devices are "cuda" too, and gfx942 has the capability 9.4: it is no Hopper."""
    return device.type == "cuda" and torch.version.hip is None


def max_blocks(device: torch.device) -> int:
    """Blocks that can work on one program: those of a cluster, from sm_90 and Triton 3.8 on."""
    if not is_nvidia(device) or not compiles_clusters(triton.__version__):
        return 1
    gpu = torch.cuda.get_device_properties(device)
    # A slice of a GPU can have too few multiprocessors for a cluster.
    has_clusters = gpu.major >= 9 and gpu.multi_processor_count >= 2 * CLUSTER_BLOCKS
    return CLUSTER_BLOCKS if has_clusters else 1


def holds_pairs(*arrays: Tensor | None) -> bool:
    """Whether elements of 16 bits can be held in pairs, which are read and held as 32 bits.

    From compute capability 10 on the compiler takes more registers for pairs than for single
    elements. What AMD's compiler does has not been tried. On both, elements are held one by one.
    """
    given = [array for array in arrays if array is not None]
    device = given[0].device
    if device.type == "cuda" and (
        not is_nvidia(device) or torch.cuda.get_device_properties(device).major >= 10
    ):
        return False
    return all(array.data_ptr() % 4 == 0 for array in given)


# Kernels that have run here, and whether the line below has been said.
_known: set[Any] = set()
_told = threading.Event()
_NOTICE_AFTER = 0.3  # seconds: what is in Triton's cache is loaded in less


@contextlib.contextmanager
def _noticing(kernel: Any) -> Iterator[None]:
    """Tell a terminal, once in a process, what it waits for while a kernel is compiled."""

    def tell() -> None:
        if not _told.is_set():
            _told.set()
            print("compiling Triton kernels ...", file=sys.stderr, flush=True)

    timer = threading.Timer(_NOTICE_AFTER, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _known.add(kernel)


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    *args: Any,
    num_warps: int = 4,
    num_ctas: int = 1,
    **meta: Any,
) -> None:
    """Run `kernel` on a one-dimensional grid of `programs` on `device`'s current stream.

    A program is a cluster of `num_ctas` blocks of `num_warps` warps.
    """
    if kernel not in _known and not _told.is_set() and sys.stderr and sys.stderr.isatty():
        with _noticing(kernel):
            return _run(kernel, programs, device, args, num_warps, num_ctas, meta)
    return _run(kernel, programs, device, args, num_warps, num_ctas, meta)


def _run(
    kernel: Any,
    programs: int,
    device: torch.device,
    args: tuple[Any, ...],
    num_warps: int,
    num_ctas: int,
    meta: dict[str, Any],
) -> None:
    options = {"num_warps": num_warps, "num_ctas": num_ctas}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **options, **meta)
    else:  # the interpreter
        kernel[(programs,)](*args, **options, **meta)
