"""What `group_norm_silu` and its backward operator refuse, with the clear messages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import _checks
from fastdiff.reference.group_norm_silu import ACTIVATIONS, compute_dtype_of


def check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    *,
    check_range: bool,
) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    op = "group_norm_silu"
    _checks.check_tensor(op, "x", x)
    _checks.check_float(op, "x", x.dtype)
    _checks.check_position(op, "activation", activation, ACTIVATIONS)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, expected (B, C, *spatial) with 1 to 3 spatial "
            "dimensions"
        )
    batch, channels = x.shape[:2]
    if isinstance(num_groups, bool) or not isinstance(num_groups, (int, torch.SymInt)):
        raise TypeError(f"{op}: num_groups is {num_groups!r}, expected an int")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"{op}: num_groups is {num_groups}, expected a divisor of the {channels} channels of x"
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: eps is {eps!r}, expected a float")
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}, expected a positive number")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None:
            _checks.check_operand(op, name, operand, (channels,), "(C,)", x.device)
    for name, operand in (("channel_bias", channel_bias), ("scale", scale), ("shift", shift)):
        if operand is not None:
            _checks.check_operand(op, name, operand, (batch, channels), "(B, C)", x.device)


def check_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    *arguments: object,
    check_range: bool,
) -> None:
    """The same of the backward operator, which takes no eps but mean and rstd."""
    op = "group_norm_silu"
    operands, activation, needs = arguments[:5], arguments[5], arguments[7:]
    weight, bias, *others = operands
    check(x, num_groups, weight, bias, 1.0, *others, activation, check_range=check_range)
    _checks.check_like(op, "grad", grad, "x", x)
    for name, given in (("mean", mean), ("rstd", rstd)):
        shape = (x.shape[0], num_groups)
        _checks.check_operand(op, name, given, shape, "(B, G)", x.device)
        if given.dtype != compute_dtype_of(x):
            raise TypeError(f"{op}: {name} has dtype {given.dtype}, expected {compute_dtype_of(x)}")
    names = ("weight", "bias", "channel_bias", "scale", "shift")
    for name, operand, needed in zip(names, operands, needs, strict=True):
        if needed and operand is None:
            raise ValueError(f"{op}: there is no {name} that could have a gradient")
