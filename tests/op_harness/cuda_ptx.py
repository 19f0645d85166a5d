"""csrc/cuda on the CPU: the unmodified launchers, linked to the emulator's CUDA runtime.

The functions have the raw operators' arguments and do in Python what csrc/bindings does in C++.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import ptx_emulator
import torch
from torch import Tensor

from fastdiff.reference.layout import memory_format_of

_CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
_DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.uint8: 3,
    torch.float64: 4,
}


class SampleLayout(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "numel", "inner", "width")]


class NoiseSource(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
    ]


class QSampleArgs(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "out",
                "x0",
                "noise",
                "t",
                "sqrt_alpha_bar",
                "sqrt_one_minus_alpha_bar",
                "flip",
            )
        ),
        ("num_timesteps", ctypes.c_int64),
        ("source", NoiseSource),
        ("layout", SampleLayout),
        *((name, ctypes.c_int32) for name in ("mode", "out_type", "x0_type", "noise_type")),
    ]


class EpsLossArgs(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "out",
                "partials",
                "grad_prediction",
                "grad_noise",
                "grad",
                "prediction",
                "noise",
                "weight",
            )
        ),
        ("source", NoiseSource),
        ("layout", SampleLayout),
        *(
            (name, ctypes.c_int32)
            for name in ("mode", "kind", "reduction", "prediction_type", "noise_type")
        ),
    ]


class PhiloxNormalArgs(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("noise", NoiseSource),
        ("layout", SampleLayout),
    ]


@functools.cache
def library(arch: str) -> Any:
    return ptx_emulator.build_launchers(
        sorted((_CSRC / "cuda").glob("*.cu")),
        include_dirs=[_CSRC / "include", _CSRC / "cuda"],
        arch=arch,
        flags=["-std=c++20", "--expt-relaxed-constexpr"],
    )


_arch = "sm_90"


@contextlib.contextmanager
def emulated_launches(
    arch: str = "sm_90", racecheck: bool = True, **options: Any
) -> Iterator[list[Any]]:
    """Inside, the functions below compile for `arch`. Yields the list of launches."""
    global _arch
    previous, _arch = _arch, arch
    try:
        with library(arch).options(racecheck=racecheck, **options) as launches:
            yield launches
    finally:
        _arch = previous


def _layout_of(x: Tensor, channels_last: bool) -> SampleLayout:
    return SampleLayout(
        x.shape[0],
        math.prod(x.shape[1:]),
        x.shape[1] if channels_last else 1,
        x.shape[-1] if x.dim() > 1 else 1,
    )


def _noise_source(keys: Tensor | None, seed: int | None, stream: int) -> NoiseSource:
    mask = (1 << 64) - 1
    return NoiseSource(_pointer(keys), (seed or 0) & mask, stream & mask)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _launch(function: str, args: ctypes.Structure, tensors: dict[str, Tensor | None]) -> None:
    lib = library(_arch)
    memory = {k: v for k, v in tensors.items() if v is not None and v.numel()}
    with lib.memory(**memory):
        error = lib[function](ctypes.c_void_p(ctypes.addressof(args)), None)
    assert error == 0, f"{function} returned CUDA error {error}: {lib.refused[-1:]}"


def q_sample(
    x0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    flip: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    if dtype is None:
        dtype = torch.float32 if x0.dtype == torch.uint8 else x0.dtype
    memory_format = memory_format_of(x0)
    channels_last = memory_format != torch.contiguous_format
    if x0.dtype not in (torch.uint8, dtype):
        x0 = x0.float()
    if noise is not None:
        noise = noise if noise.dtype == dtype else noise.float()
        noise = noise.contiguous(memory_format=memory_format)
    tensors = {
        "x0": x0.contiguous(memory_format=memory_format),
        "noise": noise,
        "t": t.contiguous(),
        "sqrt_alpha_bar": sqrt_alpha_bar.contiguous(),
        "sqrt_one_minus_alpha_bar": sqrt_one_minus_alpha_bar.contiguous(),
        "keys": None if keys is None else keys.contiguous(),
        "flip": None if flip is None else flip.contiguous(),
        "out": torch.empty(x0.shape, dtype=dtype, memory_format=memory_format),
    }
    args = QSampleArgs(
        **{name: _pointer(x) for name, x in tensors.items() if name != "keys"},
        num_timesteps=sqrt_alpha_bar.shape[0],
        source=_noise_source(tensors["keys"], seed, stream),
        layout=_layout_of(x0, channels_last),
        mode=1 if noise is not None else 2 if keys is not None or seed is not None else 0,
        out_type=_DTYPES[dtype],
        x0_type=_DTYPES[x0.dtype],
        noise_type=0 if noise is None else _DTYPES[noise.dtype],
    )
    if x0.numel():
        _launch("fastdiff_q_sample", args, tensors)
    return tensors["out"]


def philox_normal_(out: Tensor, keys: Tensor | None, seed: int | None, stream: int) -> None:
    channels_last = memory_format_of(out) != torch.contiguous_format
    keys = None if keys is None else keys.contiguous()
    args = PhiloxNormalArgs(
        out=out.data_ptr(),
        dtype=_DTYPES[out.dtype],
        noise=_noise_source(keys, seed, stream),
        layout=_layout_of(out, channels_last),
    )
    if out.numel():
        _launch("fastdiff_philox_normal", args, {"out": out, "keys": keys})


def _eps_loss_inputs(
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    reduction: int,
    kind: int,
) -> tuple[EpsLossArgs, dict[str, Tensor | None]]:
    """The fields that both passes share, and the tensors that they point to."""
    memory_format = memory_format_of(prediction)
    if noise is not None:
        noise = noise if noise.dtype == prediction.dtype else noise.float()
        noise = noise.contiguous(memory_format=memory_format)
    tensors = {
        "prediction": prediction.contiguous(memory_format=memory_format),
        "noise": noise,
        "keys": None if keys is None else keys.contiguous(),
        "weight": None if weight is None else weight.float().contiguous(),
    }
    args = EpsLossArgs(
        **{name: _pointer(x) for name, x in tensors.items() if name != "keys"},
        source=_noise_source(tensors["keys"], seed, stream),
        layout=_layout_of(prediction, memory_format != torch.contiguous_format),
        mode=1 if noise is not None else 2,
        kind=kind,
        reduction=reduction,
        prediction_type=_DTYPES[prediction.dtype],
        noise_type=0 if noise is None else _DTYPES[noise.dtype],
    )
    return args, tensors


def eps_loss(prediction: Tensor, *rest: Any) -> Tensor:
    args, tensors = _eps_loss_inputs(prediction, *rest)
    shape = () if args.reduction else prediction.shape[:1]
    tensors["out"] = torch.empty(shape)
    if tensors["out"].numel() == 0:
        return tensors["out"]
    partials = library(_arch)["fastdiff_eps_loss_partials"]
    partials.restype = ctypes.c_int64
    tensors["partials"] = torch.empty(partials(ctypes.c_void_p(ctypes.addressof(args))))
    args.out, args.partials = _pointer(tensors["out"]), _pointer(tensors["partials"])
    _launch("fastdiff_eps_loss", args, tensors)
    return tensors["out"]


def eps_loss_backward(
    grad: Tensor,
    prediction: Tensor,
    noise: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *rest, need_prediction, need_noise = rest
    args, tensors = _eps_loss_inputs(prediction, noise, *rest)
    memory_format = memory_format_of(prediction)
    tensors["grad"] = grad.contiguous()
    for name, needed in (("prediction", need_prediction), ("noise", need_noise)):
        gradient = None
        if needed:
            gradient = torch.empty(
                prediction.shape, dtype=tensors[name].dtype, memory_format=memory_format
            )
        tensors[f"grad_{name}"] = gradient
        setattr(args, f"grad_{name}", _pointer(gradient))
    args.grad = _pointer(tensors["grad"])
    if prediction.numel():
        _launch("fastdiff_eps_loss_backward", args, tensors)
    grad_noise = tensors["grad_noise"]
    return tensors["grad_prediction"], None if noise is None or grad_noise is None else (
        grad_noise.to(noise.dtype)
    )
