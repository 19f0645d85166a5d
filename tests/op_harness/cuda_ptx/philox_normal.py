"""csrc/cuda/philox_normal.cu with the raw operator's arguments."""

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
)


class PhiloxNormalArgs(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("noise", NoiseSource),
        ("layout", SampleLayout),
    ]


def philox_normal_(out: Tensor, keys: Tensor | None, seed: int | None, stream: int) -> None:
    channels_last = memory_format_of(out) != torch.contiguous_format
    keys = None if keys is None else keys.contiguous()
    args = PhiloxNormalArgs(
        out=out.data_ptr(),
        dtype=DTYPES[out.dtype],
        noise=noise_source(keys, seed, stream),
        layout=layout_of(out, channels_last),
    )
    if out.numel():
        launch("philox_normal", "fastdiff_philox_normal", args, {"out": out, "keys": keys})
