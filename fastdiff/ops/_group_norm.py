"""What `group_norm_silu` and `residual_group_norm_silu` share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops import _library
from fastdiff.reference import checks
from fastdiff.reference.group_norm_silu import compute_dtype_of
from fastdiff.reference.layout import memory_format_of


def unsupported(x: Tensor) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    if x.dtype == torch.float64 and x.device.type != "cpu":
        return "float64 kernels exist on the CPU only"
    return _library.why_reference(x)


def check_statistics(op: str, x: Tensor, num_groups: int, mean: Tensor, rstd: Tensor) -> None:
    """What a backward operator is given of the forward pass."""
    shape, dtype = (x.shape[0], num_groups), compute_dtype_of(x)
    for name, given in (("mean", mean), ("rstd", rstd)):
        checks.check_operand(op, name, given, shape, "(B, G)", x.device)
        if given.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {given.dtype}, expected {dtype}")


def check_needs(
    op: str, names: Sequence[str], operands: Sequence[Tensor | None], needs: Sequence[bool]
) -> None:
    """Gradients are asked for of operands that are given."""
    for name, operand, needed in zip(names, operands, needs, strict=True):
        if needed and operand is None:
            raise ValueError(f"{op}: {name} is None, expected a tensor that can have a gradient")


def empty_statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Memory for mean and rstd."""
    size, dtype = (x.shape[0], num_groups), compute_dtype_of(x)
    return x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=dtype)


def empty_gradients(
    x: Tensor, operands: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Memory for the gradients of x and the operands; (0,) for one that is not needed."""

    def gradient(needed: bool, like: Tensor | None, memory_format: torch.memory_format) -> Tensor:
        if not needed:
            return x.new_empty((0,))
        return torch.empty(
            like.shape, dtype=like.dtype, device=x.device, memory_format=memory_format
        )

    need_x, *others = needs
    return (
        gradient(need_x, x, memory_format_of(x)),
        *(gradient(*pair, torch.contiguous_format) for pair in zip(others, operands, strict=True)),
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether an op works in channels_last for `x`."""
    return memory_format_of(x) != torch.contiguous_format


def adjacent(operand: Tensor | None) -> Tensor | None:
    """A small operand as kernels read it: any stride between samples, none between channels."""
    if operand is None or operand.shape[-1] <= 1 or operand.stride(-1) == 1:
        return operand
    return operand.contiguous()
