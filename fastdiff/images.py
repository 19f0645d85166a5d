"""Pixels in [-1, 1] as 256 levels, and many images as one picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdiff._types import check_tensors

if TYPE_CHECKING:
    from PIL import Image

# Grids of tiny images are enlarged until a tile has at least this many pixels.
_MIN_TILE = 32


def not_finite(images: Tensor) -> Tensor:
    """Which of the images (N, ...) have a pixel that is not finite, bool (N,)."""
    return ~images.isfinite().flatten(1).all(1)


def to_uint8(images: Tensor) -> Tensor:
    """Round pixels in [-1, 1] to the nearest of the 256 levels, uint8 on the CPU.

    Raises
    ------
    ValueError
        Some are not finite, which would look like black ones.
    """
    check_tensors("to_uint8", images=images)
    if not images.isfinite().all():
        parts = images.unsqueeze(0) if images.dim() < 2 else images
        raise ValueError(
            f"{int(not_finite(parts).sum())} of {len(parts)} images have pixels that are not finite"
        )
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def image_grid(
    images: Tensor, columns: int | None = None, labels: Tensor | None = None
) -> Image.Image:
    """Lay uint8 images (N, C, H, W) out row by row, with a thin border, as one picture.

    Parameters
    ----------
    images : Tensor
        uint8, C = 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha): what is transparent
        is white, as in images that are read. Of more channels the first is shown.
    columns : int, optional
        Images per row; default: as square as it gets.
    labels : Tensor, optional
        int64 (N,): a row for each class, if classes are two or more, each with two images or more.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pictures need Pillow; install it with: pip install "fastdiff[train]"'
        ) from error

    check_tensors("image_grid", images=images)
    num, _, height, width = images.shape
    places = None if labels is None else _places_by_class(labels)
    if places is None:
        columns = columns or math.ceil(math.sqrt(num))
        places = [divmod(index, columns) for index in range(num)]
    columns = max(columns or 0, *(column + 1 for _, column in places), 1)
    rows = max((row + 1 for row, _ in places), default=0)
    zoom = max(1, math.ceil(_MIN_TILE / max(height, width)))
    tiles = _opaque(images).permute(0, 2, 3, 1).numpy()
    tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width, border = height * zoom, width * zoom, 2
    canvas = np.full(
        (rows * (height + border) + border, columns * (width + border) + border, tiles.shape[3]),
        255,
        np.uint8,
    )
    for (row, column), tile in zip(places, tiles, strict=True):
        top, left = border + row * (height + border), border + column * (width + border)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas)


def _places_by_class(labels: Tensor) -> list[tuple[int, int]] | None:
    """(row, column) of every image, None where rows by class would show nothing."""
    classes, row, count = labels.cpu().unique(return_inverse=True, return_counts=True)
    if len(classes) < 2 or int(count.min()) < 2:
        return None
    seen = [0] * len(classes)
    places = []
    for r in row.tolist():
        places.append((r, seen[r]))
        seen[r] += 1
    return places


def _opaque(images: Tensor) -> Tensor:
    """Images of 1 or 3 channels: on white, if they have an alpha channel."""
    channels = images.shape[1]
    if channels in (1, 3):
        return images
    if channels not in (2, 4):
        return images[:, :1]
    alpha = images[:, -1:].float() / 255
    mixed = images[:, :-1].float() * alpha + 255 * (1 - alpha)
    return mixed.round().to(torch.uint8)
