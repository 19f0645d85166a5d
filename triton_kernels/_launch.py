"""One place through which every Triton kernel is launched.

The tests replace `launch` to run the same launchers' kernels as compiled PTX on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch


def launch(
    kernel: Any, programs: int, device: torch.device, *args: Any, num_warps: int = 4, **meta: Any
) -> None:
    """Run `kernel` on a one-dimensional grid of `programs` on `device`'s current stream."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[(programs,)](*args, num_warps=num_warps, **meta)
    else:  # the interpreter
        kernel[(programs,)](*args, num_warps=num_warps, **meta)
