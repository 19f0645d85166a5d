"""The image and the mask that ``python -m fastdiff.sample --image --mask`` are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.reference.q_sample import pixels_from_uint8
from fastdiff.training.errors import UserError, printable
from fastdiff.training.image_files import UnusableImage, decode
from fastdiff.training.trained import TrainedRun, training_images

PARTS = ("left", "right", "top", "bottom", "centre")


def known_image(run: TrainedRun, name: str, warn: Callable[[str], None]) -> Tensor:
    """(1, C, H, W) float32 in [-1, 1]: an image file, or number ``name`` of the training images.

    Raises
    ------
    UserError
        There is none, or it cannot be read.
    """
    if name.isdecimal():
        dataset = training_images(run, warn=warn)
        if int(name) >= len(dataset):
            raise UserError(f"--image {name}: the run has images 0..{len(dataset) - 1}")
        levels = torch.from_numpy(dataset.read([int(name)]))[0]
    else:
        levels = _decoded("--image", name, run.image_shape)
    return pixels_from_uint8(levels.permute(2, 0, 1)[None].contiguous())


def known_mask(run: TrainedRun, name: str) -> Tensor:
    """(1, H, W) bool, true where pixels are kept: all but a named part, or but what a file has
    white.

    Raises
    ------
    UserError
        No such part or file, or nothing is kept or drawn anew.
    """
    _, height, width = run.image_shape
    y = torch.arange(height)[:, None].expand(height, width)
    x = torch.arange(width).expand(height, width)
    inside = (y >= height // 4) & (y < height - height // 4)
    inside &= (x >= width // 4) & (x < width - width // 4)
    parts = (x < width // 2, x >= width // 2, y < height // 2, y >= height // 2, inside)
    if name in PARTS:
        anew = parts[PARTS.index(name)]
    else:
        anew = _decoded("--mask", name, (1, height, width))[..., 0] > 127
    if bool(anew.all()) or not bool(anew.any()):
        raise UserError(
            f"--mask {printable(name)}: {'all' if bool(anew.all()) else 'none'} of it is white; "
            "what is white is drawn anew, the rest is kept"
        )
    return ~anew[None]


def _decoded(flag: str, name: str, image_shape: tuple[int, int, int]) -> Tensor:
    """uint8 (H, W, C) of a file."""
    channels, height, width = image_shape
    path = Path(name)
    if not path.is_file():
        other = f"{', '.join(PARTS)} or " if flag == "--mask" else "a number or "
        raise UserError(f"{flag} {printable(name)}: no such file; give {other}an image file")
    if channels not in (1, 3):
        raise UserError(f"{flag}: files have 1 or 3 channels, the run's images {channels}")
    try:
        levels = decode(path, printable(name), (height, width, channels))
    except UnusableImage as error:
        raise UserError(f"{flag} {printable(name)}: {error}") from error
    return torch.from_numpy(levels.copy())
