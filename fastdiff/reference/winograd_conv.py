"""3x3 convolution by Winograd's F(2x2, 3x3), in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Lavin & Gray 2015, eq. 13: y = A^T [(G g G^T) * (B^T d B)] A.
INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B^T
KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))  # A^T
# Behind an upsampling d = (a, b, b, c): the third point is b - b = 0 and left out.
UPSAMPLED = [0, 1, 3]

# As csrc/include/fastdiff/winograd_conv.h: output channels that the kernels compute together, and
# what all channels are multiples of.
BLOCK, LANES = 32, 16


def transform_weight(weight: Tensor, upsample: bool = False) -> Tensor:
    """(O, C, 3, 3) -> G g G^T as the kernels read it, float32.

    Returns
    -------
    Tensor
        One-dimensional: blocks of 32 output channels, each (P, C, 32), of 16 points, or 9 with
        `upsample`. The last block has 16 channels where O is an odd multiple of 16. Computed in
        float64 and rounded once.
    """
    out_channels, channels = weight.shape[:2]
    kernel = _matrix(KERNEL, torch.float64)
    if upsample:  # with the 2 of the second point, b + b, of which the kernels take b
        kernel = kernel[UPSAMPLED] * torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64)
    points = len(kernel) ** 2
    both = torch.einsum("pi,qj->pqij", kernel, kernel).reshape(points, 9)
    flat = weight.detach().double().reshape(out_channels * channels, 9)
    transformed = (both @ flat.T).reshape(points, out_channels, channels)
    return torch.cat(
        [block.transpose(1, 2).flatten() for block in transformed.split(BLOCK, dim=1)]
    ).float()


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    upsample: bool = False,
) -> Tensor:
    """``conv3x3(x) + bias + residual`` with stride 1 and a border of zeros.

    Parameters
    ----------
    x : (B, C, H, W)
        H and W even; any even or odd ones with `upsample`, which doubles x by repeating its pixels
        before the convolution.
    weight
        What `transform_weight` made.
    residual
        Like the result.

    Returns
    -------
    (B, O, H, W) or (B, O, 2H, 2W), channels_last

    References
    ----------
    Lavin & Gray 2015, arXiv 1509.09308.
    """
    batch, channels = x.shape[:2]
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    height, width = x.shape[2:]
    d = F.pad(x, (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)  # (B, C, H/2, W/2, 4, 4)
    forward, back = _matrix(INPUT, x.dtype), _matrix(OUTPUT, x.dtype)
    if upsample:
        forward, back = forward[UPSAMPLED], back[:, UPSAMPLED]
        forward = forward * torch.tensor([[1.0], [0.5], [1.0]], dtype=x.dtype)
    transformed = torch.einsum("pi,bcyxij,qj->bcyxpq", forward, d, forward)
    points = len(forward) ** 2
    blocks, start = [], 0
    for first in range(0, out_channels, BLOCK):
        block = min(BLOCK, out_channels - first)
        part = weight[start : start + points * channels * block].to(x.dtype)
        blocks.append(part.reshape(len(forward), len(forward), channels, block))
        start += part.numel()
    m = torch.einsum("bcyxpq,pqco->boyxpq", transformed, torch.cat(blocks, 3))
    y = torch.einsum("rp,boyxpq,sq->boyrxs", back, m, back)
    y = y.reshape(batch, out_channels, height, width)
    y = y if bias is None else y + bias.to(y.dtype)[:, None, None]
    y = y if residual is None else y + residual
    return y.contiguous(memory_format=torch.channels_last)


def _matrix(rows: tuple[tuple[float, ...], ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype)
