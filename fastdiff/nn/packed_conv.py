"""Convolutions for inference on a CPU: weights kept as the kernels read them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff._backends import select_backend
from fastdiff.ops._winograd_conv import winograd_conv
from fastdiff.reference.winograd_conv import LANES, transform_weight

# At 4x4 reading the transformed weights, 16/9 of the others, takes what is gained at batch 1 and 2;
# at batch 16 Winograd takes half of the time. Below, its tiles are mostly border.
SMALLEST_MAP = 4


def _has_packed_weights(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's convolutions with weights that are reordered beforehand.

    They are internal operators of torch, those of Inductor's freezing; 2.10 to 2.14 have them.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedConv:
    """``conv(x) + residual`` of an `nn.Conv2d`, and with `upsample` of x doubled in size.

    Winograd's F(2x2, 3x3) where it is faster (`_fits_winograd`), else oneDNN's convolution with
    reordered weights, or `F.conv2d` if this torch has no such operator. Each kind of weight is made
    when it is first used. Tensors are channels_last and of `dtype`.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        self._conv = conv
        self._dtype = dtype
        self._bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self._transformed: dict[bool, Tensor] = {}
        self._packed: tuple[torch.Size, Tensor] | None = None
        self._packs = _has_packed_weights(dtype)

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, *, upsample: bool = False
    ) -> Tensor:
        if self._fits_winograd(x, 2 if upsample else 1):
            if upsample not in self._transformed:
                self._transformed[upsample] = transform_weight(self._conv.weight, upsample)
            weight, out_channels = self._transformed[upsample], self._conv.out_channels
            return winograd_conv(x, weight, self._bias, residual, out_channels, upsample)
        if upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self._direct(x, residual)

    def _fits_winograd(self, x: Tensor, scale: int) -> bool:
        conv, (height, width) = self._conv, x.shape[2:]
        return (
            self._dtype == torch.float32
            and conv.kernel_size == (3, 3)
            and conv.stride == conv.padding == (1, 1)
            and conv.in_channels % LANES == conv.out_channels % LANES == 0
            and scale * height % 2 == scale * width % 2 == 0
            and scale * min(height, width) >= SMALLEST_MAP
            and select_backend("winograd_conv", x, None) == "cpu"
        )

    def _direct(self, x: Tensor, residual: Tensor | None) -> Tensor:
        conv = self._conv
        if not self._packs or not len(x):
            weight = conv.weight.detach().to(self._dtype)
            y = F.conv2d(x, weight, self._bias, conv.stride, conv.padding)
            return y if residual is None else y + residual
        mkldnn, (padding, stride, dilation) = torch.ops.mkldnn, self._geometry()
        # oneDNN chooses the order of the weights for one size of x.
        if self._packed is None or self._packed[0] != x.shape:
            weight = conv.weight.detach().to(self._dtype, memory_format=torch.channels_last)
            self._packed = (
                x.shape,
                mkldnn._reorder_convolution_weight(
                    weight, padding, stride, dilation, 1, list(x.shape)
                ),
            )
        weight = self._packed[1]
        # Torch 2.10 does not find the order of a residual of one pixel or channel.
        fused = residual is not None and residual.shape[1] > 1 and residual[0, 0].numel() > 1
        if not fused:
            y = mkldnn._convolution_pointwise(
                x, weight, self._bias, padding, stride, dilation, 1, "none", [], ""
            )
            return y if residual is None else y + residual
        return mkldnn._convolution_pointwise.binary(
            x,
            residual,
            weight,
            self._bias,
            padding,
            stride,
            dilation,
            1,
            "add",
            1.0,
            None,
            [],
            None,
        )

    def _geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self._conv.padding), list(self._conv.stride), [1, 1]
