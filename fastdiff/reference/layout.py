"""Memory formats: an op's output has the format of its main input."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format an op works in for `x`: contiguous or channels_last (4-D and 5-D).

    A tensor whose strides are neither counts as channels_last when its channels are innermost
    (a slice of a channels_last tensor), else as contiguous; the op then works on a copy. One that
    torch.func.vmap batches has no layout to ask for, and counts as contiguous.
    """
    if _is_batched(x):
        return torch.contiguous_format
    if x.is_contiguous() or (channels_last := _CHANNELS_LAST.get(x.dim())) is None:
        return torch.contiguous_format
    if x.is_contiguous(memory_format=channels_last) or (x.stride(1) == 1 and x.shape[1] > 1):
        return channels_last
    return torch.contiguous_format


def in_memory_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`x`, copied if it has another format; contiguous where torch.func.vmap batches it.

    Before torch 2.14 torch.group_norm under vmap takes contiguous tensors only.
    """
    return x.contiguous() if _is_batched(x) else x.contiguous(memory_format=memory_format)


def _is_batched(x: Tensor) -> bool:
    """Whether a vmap is among the transforms that `x` is inside of."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return False
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False
