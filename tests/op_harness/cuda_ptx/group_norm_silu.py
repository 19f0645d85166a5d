"""csrc/cuda/group_norm_silu*.cu with the raw operators' arguments."""

from __future__ import annotations

import ctypes
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.reference.layout import memory_format_of

from .launcher import DTYPES, NoiseSource, function, launch, noise_source, pointer

_TENSORS = ("x", "y", "residual", "sum", "grad", "grad_x", "grad_sum")
_OPERANDS = ("weight", "bias", "channel_bias", "scale", "shift")


class Dropped(Protocol):
    """fastdiff.reference.dropout.Dropout, or whatever has its fields."""

    threshold: int
    keys: Tensor | None
    seed: int | None
    stream: int


class GroupNormLayout(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "groups", "pixels")),
        ("channels_last", ctypes.c_bool),
    ]


class ChannelVector(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


class ChannelGradient(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32)]


class Dropout(ctypes.Structure):
    _fields_ = [("source", NoiseSource), ("threshold", ctypes.c_int32)]


class GroupNormSiluArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "mean", "rstd", "workspace", "x")),
        *((name, ChannelVector) for name in _OPERANDS),
        ("residual", ctypes.c_void_p),
        ("sum_bias", ChannelVector),
        ("sum", ctypes.c_void_p),
        ("dropout", Dropout),
        ("layout", GroupNormLayout),
        ("eps", ctypes.c_double),
        ("activation", ctypes.c_int32),
        ("x_type", ctypes.c_int32),
    ]


class GroupNormSiluBackwardArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_x", "workspace")),
        *((f"grad_{name}", ChannelGradient) for name in _OPERANDS),
        *((name, ctypes.c_void_p) for name in ("grad", "x", "mean", "rstd")),
        *((name, ChannelVector) for name in _OPERANDS),
        ("grad_sum", ctypes.c_void_p),
        ("grad_sum_bias", ChannelGradient),
        ("dropout", Dropout),
        ("layout", GroupNormLayout),
        ("activation", ctypes.c_int32),
        ("x_type", ctypes.c_int32),
    ]


def _operand(given: Tensor | None, x: Tensor) -> Tensor | None:
    if given is None:
        return None
    ready = given if given.dtype in (torch.float32, x.dtype) else given.float()
    return ready if ready.stride(-1) == 1 or ready.shape[-1] == 1 else ready.contiguous()


def _vector(operand: Tensor | None) -> ChannelVector:
    if operand is None:
        return ChannelVector(None, 0, 0)
    row_stride = operand.stride(0) if operand.dim() == 2 else 0
    return ChannelVector(pointer(operand), row_stride, DTYPES[operand.dtype])


def _whole(x: Tensor | None) -> Tensor | None:
    """The allocation around a view, which is what the emulator has to know of."""
    if x is None or x.is_contiguous():
        return x
    return torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def _as(given: Tensor, x: Tensor) -> Tensor:
    """In the dtype and memory format of x."""
    return given.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def _drop(
    args: ctypes.Structure, tensors: dict[str, Tensor | None], dropout: Dropped | None
) -> None:
    if dropout is None:
        return
    tensors["keys"] = dropout.keys
    args.dropout = Dropout(
        noise_source(dropout.keys, dropout.seed, dropout.stream), dropout.threshold
    )


def _fill(
    args: ctypes.Structure,
    x: Tensor,
    num_groups: int,
    operands: dict[str, Tensor | None],
    activation: int,
) -> dict[str, Tensor | None]:
    """The fields that both passes share; returns the tensors that they point to."""
    memory_format = memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    ready = {name: _operand(operand, x) for name, operand in operands.items()}
    args.x = pointer(x)
    for name, operand in ready.items():
        setattr(args, name, _vector(operand))
    args.layout = GroupNormLayout(
        *x.shape[:2], num_groups, math.prod(x.shape[2:]), memory_format != torch.contiguous_format
    )
    args.activation = activation
    args.x_type = DTYPES[x.dtype]
    return {"x": x, **ready}


def _launch(name: str, args: ctypes.Structure, tensors: dict[str, Tensor | None]) -> None:
    workspace = function("group_norm_silu", f"{name}_workspace")
    workspace.restype = ctypes.c_int64
    tensors["workspace"] = torch.empty(workspace(ctypes.c_void_p(ctypes.addressof(args))))
    args.workspace = pointer(tensors["workspace"])
    # Halves of one chunked tensor lie in the same allocation, which is declared once.
    memory = {}
    for key, tensor in tensors.items():
        whole = tensor if key in _TENSORS else _whole(tensor)
        if whole is None or any(
            whole.data_ptr() == other.data_ptr() and whole.nbytes <= other.nbytes
            for other in memory.values()
        ):
            continue
        memory[key] = whole
    launch("group_norm_silu", name, args, memory)


def group_norm_silu(
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
    dropout: Dropped | None = None,
    residual: Tensor | None = None,
    sum_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """y, mean and rstd; with a residual the sum too."""
    args = GroupNormSiluArgs(eps=eps)
    operands = dict(zip(_OPERANDS, (weight, bias, channel_bias, scale, shift), strict=True))
    tensors = _fill(args, x, num_groups, operands, activation)
    tensors |= {
        "y": torch.empty_like(tensors["x"]),
        "mean": torch.empty(x.shape[0], num_groups),
        "rstd": torch.empty(x.shape[0], num_groups),
        "residual": None if residual is None else _as(residual, tensors["x"]),
        "sum": None if residual is None else torch.empty_like(tensors["x"]),
        "sum_bias": _operand(sum_bias, x),
    }
    for name in ("y", "mean", "rstd", "residual", "sum"):
        setattr(args, name, pointer(tensors[name]))
    args.sum_bias = _vector(tensors["sum_bias"])
    _drop(args, tensors, dropout)
    if x.numel():
        _launch("fastdiff_group_norm_silu", args, tensors)
    results = ("y", "mean", "rstd", *(() if residual is None else ("sum",)))
    return tuple(tensors[name] for name in results)


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    need_x: bool,
    *needs: bool,
    dropout: Dropped | None = None,
    grad_sum: Tensor | None = None,
    sum_bias_type: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """`sum_bias_type`: of the gradient of sum_bias, which is the last result if asked for."""
    args = GroupNormSiluBackwardArgs()
    operands = dict(zip(_OPERANDS, (weight, bias, channel_bias, scale, shift), strict=True))
    tensors = _fill(args, x, num_groups, operands, activation)
    tensors |= {
        "grad": _as(grad, tensors["x"]),
        "mean": mean.contiguous(),
        "rstd": rstd.contiguous(),
        "grad_x": torch.empty_like(tensors["x"]) if need_x else None,
        "grad_sum": None if grad_sum is None else _as(grad_sum, tensors["x"]),
    }
    for name in ("grad", "mean", "rstd", "grad_x", "grad_sum"):
        setattr(args, name, pointer(tensors[name]))
    _drop(args, tensors, dropout)
    if sum_bias_type is not None:
        tensors["grad_sum_bias"] = torch.empty(x.shape[1], dtype=sum_bias_type)
        args.grad_sum_bias = ChannelGradient(
            pointer(tensors["grad_sum_bias"]), DTYPES[sum_bias_type]
        )
    for name, needed in zip(_OPERANDS, needs, strict=True):
        if needed:
            out = torch.zeros if x.numel() == 0 else torch.empty
            tensors[f"grad_{name}"] = out(tensors[name].shape, dtype=tensors[name].dtype)
            setattr(
                args,
                f"grad_{name}",
                ChannelGradient(pointer(tensors[f"grad_{name}"]), DTYPES[tensors[name].dtype]),
            )
    if x.numel():
        _launch("fastdiff_group_norm_silu_backward", args, tensors)
    gradients = [tensors["grad_x"]]
    for name, needed in zip(_OPERANDS, needs, strict=True):
        gradients.append(tensors[f"grad_{name}"].to(operands[name].dtype) if needed else None)
    if sum_bias_type is not None:
        gradients.append(tensors["grad_sum_bias"])
    return tuple(gradients)
