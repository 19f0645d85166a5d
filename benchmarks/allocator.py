"""An allocator that keeps its memory. Imports nothing large: it may start the command again."""

from __future__ import annotations

import os
import platform
import sys

# By default glibc maps large tensors freshly and unmaps them when they are freed, and gives the top
# of the heap back as well. Every new page then faults and is zeroed by the kernel when it is first
# written, which costs more than computing what goes into it, and which contender pays is up to the
# state of the heap. A training loop keeps its memory, so all contenders here do: nothing is mapped,
# nothing is given back, and the heap grows by 1 GiB at a time.
STEADY_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(1 << 30),
}


def ensure_steady_allocator() -> None:
    """Start this command again with `STEADY_ALLOCATOR`, unless it runs with it already.

    glibc reads these variables once, before main: setting them in a running process does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    if all(os.environ.get(name) == value for name, value in STEADY_ALLOCATOR.items()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, os.environ | STEADY_ALLOCATOR)
