"""csrc/cuda/eps_loss.cu with the raw operators' arguments."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastdiff.reference.layout import memory_format_of

from .launcher import (
    DTYPES,
    NoiseSource,
    SampleLayout,
    function,
    launch,
    layout_of,
    noise_source,
    pointer,
)


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
        **{name: pointer(x) for name, x in tensors.items() if name != "keys"},
        source=noise_source(tensors["keys"], seed, stream),
        layout=layout_of(prediction, memory_format != torch.contiguous_format),
        mode=1 if noise is not None else 2,
        kind=kind,
        reduction=reduction,
        prediction_type=DTYPES[prediction.dtype],
        noise_type=0 if noise is None else DTYPES[noise.dtype],
    )
    return args, tensors


def eps_loss(prediction: Tensor, *rest: Any) -> Tensor:
    args, tensors = _eps_loss_inputs(prediction, *rest)
    shape = () if args.reduction else prediction.shape[:1]
    tensors["out"] = torch.empty(shape)
    if tensors["out"].numel() == 0:
        return tensors["out"]
    partials = function("eps_loss", "fastdiff_eps_loss_partials")
    partials.restype = ctypes.c_int64
    tensors["partials"] = torch.empty(partials(ctypes.c_void_p(ctypes.addressof(args))))
    args.out, args.partials = pointer(tensors["out"]), pointer(tensors["partials"])
    launch("eps_loss", "fastdiff_eps_loss", args, tensors)
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
        setattr(args, f"grad_{name}", pointer(gradient))
    args.grad = pointer(tensors["grad"])
    if prediction.numel():
        launch("eps_loss", "fastdiff_eps_loss_backward", args, tensors)
    grad_noise = tensors["grad_noise"]
    return tensors["grad_prediction"], None if noise is None or grad_noise is None else (
        grad_noise.to(noise.dtype)
    )
