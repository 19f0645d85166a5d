"""csrc/cuda/vlb_terms.cu with the raw operators' arguments."""

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


class VlbTermsArgs(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "out",
                "partials",
                "grad_output",
                "grad",
                "x0",
                "x_t",
                "model_output",
                "noise",
                "t",
                "table",
            )
        ),
        ("num_rows", ctypes.c_int64),
        ("source", NoiseSource),
        ("layout", SampleLayout),
        *(
            (name, ctypes.c_int32)
            for name in (
                "mode",
                "prediction",
                "learned",
                "clip",
                "detach_mean",
                "noise_type",
                "output_type",
            )
        ),
    ]


def _vlb_terms_inputs(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    prediction: int,
    learned: bool,
    clip: bool,
    detach_mean: bool,
) -> tuple[VlbTermsArgs, dict[str, Tensor | None]]:
    """The fields that both passes share, and the tensors that they point to."""
    memory_format = memory_format_of(x_t)
    dtypes = {x.dtype for x in (x0, x_t, model_output, noise) if x is not None}
    data_type = x_t.dtype if len(dtypes) == 1 else torch.float32

    def ready(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.to(dtype).contiguous(memory_format=memory_format)

    tensors = {
        "x0": ready(x0, data_type),
        "x_t": ready(x_t, data_type),
        "model_output": ready(model_output, model_output.dtype),
        "noise": ready(noise, data_type),
        "t": t.contiguous(),
        "table": table.contiguous(),
        "keys": None if keys is None else keys.contiguous(),
    }
    args = VlbTermsArgs(
        **{name: pointer(x) for name, x in tensors.items() if name != "keys"},
        num_rows=table.shape[0],
        source=noise_source(tensors["keys"], seed, stream),
        layout=layout_of(x_t, memory_format != torch.contiguous_format),
        mode=1 if noise is not None else 2,
        prediction=prediction,
        learned=learned,
        clip=clip,
        detach_mean=detach_mean,
        noise_type=DTYPES[data_type],
        output_type=DTYPES[model_output.dtype],
    )
    return args, tensors


def vlb_terms(x0: Tensor, *rest: Any) -> Tensor:
    args, tensors = _vlb_terms_inputs(x0, *rest)
    tensors["out"] = torch.empty((3, x0.shape[0]))
    if tensors["out"].numel() == 0:
        return tensors["out"]
    partials = function("vlb_terms", "fastdiff_vlb_terms_partials")
    partials.restype = ctypes.c_int64
    tensors["partials"] = torch.empty(partials(ctypes.c_void_p(ctypes.addressof(args))))
    args.out, args.partials = pointer(tensors["out"]), pointer(tensors["partials"])
    launch("vlb_terms", "fastdiff_vlb_terms", args, tensors)
    return tensors["out"]


def vlb_terms_backward(grad: Tensor, *arguments: Any) -> Tensor:
    args, tensors = _vlb_terms_inputs(*arguments)
    output = tensors["model_output"]
    tensors["grad"] = grad.contiguous()
    tensors["grad_output"] = torch.empty_like(output)
    args.grad, args.grad_output = pointer(tensors["grad"]), pointer(tensors["grad_output"])
    if output.numel():
        launch("vlb_terms", "fastdiff_vlb_terms_backward", args, tensors)
    return tensors["grad_output"]
