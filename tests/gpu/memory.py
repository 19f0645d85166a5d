"""A device with hardly any memory left."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def room(megabytes: int) -> Iterator[None]:
    """Inside, torch may have so much more than is in use.

    What its allocator holds back in pieces, beside tensors of other tests, is filled first: a call
    that should find no room could find it there.
    """
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    fillers = []
    try:
        for size in (32 << 20, 8 << 20, 2 << 20, 1 << 20):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    fillers.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        allowed = torch.cuda.memory_reserved() + (megabytes << 20)
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
