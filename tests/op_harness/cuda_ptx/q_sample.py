"""csrc/cuda/q_sample.cu with the raw operator's arguments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastdiff.reference.layout import memory_format_of

from .launcher import (
    DTYPES,
    NoiseSource,
    SampleLayout,
    launch,
    layout_of,
    noise_source,
    pointer,
)


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
        **{name: pointer(x) for name, x in tensors.items() if name != "keys"},
        num_timesteps=sqrt_alpha_bar.shape[0],
        source=noise_source(tensors["keys"], seed, stream),
        layout=layout_of(x0, channels_last),
        mode=1 if noise is not None else 2 if keys is not None or seed is not None else 0,
        out_type=DTYPES[dtype],
        x0_type=DTYPES[x0.dtype],
        noise_type=0 if noise is None else DTYPES[noise.dtype],
    )
    if x0.numel():
        launch("q_sample", "fastdiff_q_sample", args, tensors)
    return tensors["out"]
