"""What the launchers of ddim_step and ddpm_step share."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastdiff.ops._sampler_step import DDPM, Arguments, empty_results
from fastdiff.reference.layout import memory_format_of
from fastdiff.reference.step_columns import PREDICTIONS

from .launcher import (
    DTYPES,
    NoiseSource,
    SampleLayout,
    launch,
    layout_of,
    noise_source,
    pointer,
)

# EpsSource of csrc/include/fastdiff/sampler_step.h.
_NONE, _OUTPUT, _X0, _UNCLIPPED_X0 = range(4)


class SamplerStepArgs(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x_s",
                "pred_x0",
                "x_t",
                "model_output",
                "uncond",
                "noise",
                "step",
                "table",
            )
        ),
        ("num_rows", ctypes.c_int64),
        ("guidance_scale", ctypes.c_double),
        ("source", NoiseSource),
        ("layout", SampleLayout),
        *(
            (name, ctypes.c_int32)
            for name in (
                "mode",
                "prediction",
                "eps",
                "clip",
                "two_heads",
                "learned",
                "x_type",
                "output_type",
            )
        ),
    ]


def _eps_source(name: str, a: Arguments) -> int:
    if name == DDPM:
        return _NONE
    if a.clip and a.flag:
        return _X0
    return _OUTPUT if PREDICTIONS[a.prediction] in ("eps", "v") else _UNCLIPPED_X0


def run(name: str, *arguments: object) -> tuple[Tensor, Tensor]:
    a = Arguments(*arguments)
    dtype = a.x_t.dtype
    x_dtype = dtype if a.noise is None or a.noise.dtype == dtype else torch.float32
    output_dtype = a.model_output.dtype
    if x_dtype not in (torch.float32, output_dtype):
        output_dtype = torch.float32
    if a.uncond is not None and a.uncond.dtype != output_dtype:
        output_dtype = torch.float32
    memory_format = memory_format_of(a.x_t)

    def ready(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.to(dtype).contiguous(memory_format=memory_format)

    x_s, pred_x0 = empty_results(a._replace(x_t=ready(a.x_t, x_dtype)))
    tensors = {
        "x_s": x_s,
        "pred_x0": pred_x0 if a.return_pred_x0 else None,
        "x_t": ready(a.x_t, x_dtype),
        "model_output": ready(a.model_output, output_dtype),
        "uncond": ready(a.uncond, output_dtype),
        "noise": ready(a.noise, x_dtype),
        "step": a.step.contiguous(),
        "table": a.table.contiguous(),
        "keys": None if a.keys is None else a.keys.contiguous(),
    }
    generated = a.keys is not None or a.seed is not None
    args = SamplerStepArgs(
        **{field: pointer(x) for field, x in tensors.items() if field != "keys"},
        num_rows=a.table.shape[0],
        guidance_scale=a.guidance_scale,
        source=noise_source(tensors["keys"], a.seed, a.stream),
        layout=layout_of(a.x_t, memory_format != torch.contiguous_format),
        mode=1 if a.noise is not None else 2 if generated else 0,
        prediction=a.prediction,
        eps=_eps_source(name, a),
        clip=a.clip,
        two_heads=a.model_output.shape[1] != a.x_t.shape[1],
        learned=name == DDPM and a.flag,
        x_type=DTYPES[x_dtype],
        output_type=DTYPES[output_dtype],
    )
    if a.x_t.numel():
        launch(name, f"fastdiff_{name}", args, tensors)
    return x_s.to(dtype), pred_x0.to(dtype)
