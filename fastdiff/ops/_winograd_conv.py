"""The operator behind the inference form's 3x3 convolutions: CPU, float32, no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import _library
from fastdiff.reference import winograd_conv as reference

SCHEMA = (
    "winograd_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt out_channels, "
    "bool upsample) -> Tensor"
)

_library._library.define(SCHEMA, tags=_library.TAGS)
if not _library._has_kernel("winograd_conv", "CPU"):
    _library._library.impl("winograd_conv", reference.winograd_conv, "CPU")


@torch.library.register_fake("fastdiff::winograd_conv", lib=_library._library)
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    upsample: bool,
) -> Tensor:
    scale = 2 if upsample else 1
    shape = (x.shape[0], out_channels, scale * x.shape[2], scale * x.shape[3])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


winograd_conv = torch.ops.fastdiff.winograd_conv.default
