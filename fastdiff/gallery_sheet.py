"""A labelled sheet of images: rows and columns of tiles with a title, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdiff.images import image_grid

if TYPE_CHECKING:
    from PIL import Image

# Tiles of small images are enlarged by whole factors until they have at least this many pixels.
_TILE = 48
_INK, _FAINT, _PAPER = (34, 34, 34), (110, 110, 110), (255, 255, 255)
_TEXT, _TITLE, _MARGIN, _GAP = 13, 16, 14, 4


def sheet(
    rows: Sequence[Sequence[Tensor | None]],
    title: str,
    subtitle: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    groups: int = 0,
) -> Image.Image:
    """Lay tiles out in rows with labels.

    Parameters
    ----------
    rows
        uint8 images (C, H, W) of one shape, row by row; None leaves a place empty.
    title, subtitle
        What the picture shows, and how it was made; the latter wraps.
    row_labels, column_labels
        One per row or column, in small print; several lines are separated by newlines.
    groups
        A wider gap after every so many columns; 0: none.

    Raises
    ------
    ValueError
        No tile, or labels that are not one per row or column.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = max((len(row) for row in rows), default=0)
    tiles = [tile for row in rows for tile in row if tile is not None]
    if not tiles:
        raise ValueError("rows hold no tile")
    for name, labels, count in (
        ("row_labels", row_labels, len(rows)),
        ("column_labels", column_labels, columns),
    ):
        if labels and len(labels) != count:
            raise ValueError(f"{name} has {len(labels)} entries, expected {count}")
    small, large = ImageFont.load_default(_TEXT), ImageFont.load_default(_TITLE)
    height, width = tiles[0].shape[1:]
    zoom = max(1, math.ceil(_TILE / max(height, width)))
    height, width = height * zoom, width * zoom

    def extent(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
        box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font)
        return math.ceil(box[2]), math.ceil(box[3])

    label_width = max((extent(t, small)[0] for t in row_labels), default=-_GAP) + 2 * _GAP
    left = _MARGIN + label_width

    def place(column: int) -> int:
        return left + column * (width + _GAP) + (column // groups if groups else 0) * 3 * _GAP

    right = max(place(columns - 1) + width, _MARGIN + extent(title, large)[0])
    subtitle = _wrapped(subtitle, right - _MARGIN, lambda text: extent(text, small)[0])
    top = _MARGIN + extent(title, large)[1] + _GAP
    subtitle_top = top
    if subtitle:
        top += extent(subtitle, small)[1] + _GAP
    label_top = top + _GAP
    top = label_top + max((extent(t, small)[1] + _GAP for t in column_labels), default=0)
    canvas = Image.new(
        "RGB", (right + _MARGIN, top + len(rows) * (height + _GAP) - _GAP + _MARGIN), _PAPER
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), title, _INK, large)
    draw.multiline_text((_MARGIN, subtitle_top), subtitle, _FAINT, small)
    for column, text in enumerate(column_labels):
        x = place(column) + (width - extent(text, small)[0]) // 2
        draw.multiline_text((x, label_top), text, _INK, small, align="center")
    for index, row in enumerate(rows):
        y = top + index * (height + _GAP)
        if row_labels:
            text = row_labels[index]
            text_width, text_height = extent(text, small)
            where = (left - _GAP - text_width, y + (height - text_height) // 2 - 1)
            draw.multiline_text(where, text, _INK, small, align="right")
        for column, tile in enumerate(row):
            if tile is not None:
                canvas.paste(_enlarged(tile, zoom), (place(column), y))
    # Grey images need no palette of colours: a third of the bytes.
    grey = all(tile.shape[0] <= 2 for tile in tiles)
    return canvas.convert("L") if grey else canvas


def _enlarged(tile: Tensor, zoom: int) -> Image.Image:
    from PIL import Image

    picture = image_grid(tile[None])  # opaque, of 1 or 3 channels; with a border of 2 pixels
    pixels = np.asarray(picture)[2:-2, 2:-2]
    scale = zoom / (pixels.shape[0] / tile.shape[1])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def _wrapped(text: str, most: int, measure) -> str:
    """The text in lines of at most so many pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and measure(longer) <= most:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def tiles(images: Tensor) -> list[Tensor]:
    """uint8 images (N, C, H, W) as a row."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images has dtype {images.dtype}, expected torch.uint8")
    return list(images)
