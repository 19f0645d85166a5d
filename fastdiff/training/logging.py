"""What a run shows while it trains: metrics.jsonl, loss.png, grids of samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.training.checkpoint import write_atomic

if TYPE_CHECKING:
    from PIL import Image

# Grids of tiny images are enlarged until a tile has at least this many pixels.
_MIN_TILE = 32


class Metrics:
    """The lines of metrics.jsonl, on disk and in memory.

    Parameters
    ----------
    path : Path
        The file; appended to.
    last_step : int
        Lines after this step, written by a run that was lost after its last checkpoint, are
        dropped, so that the file reads as if the run had never stopped.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # cut off while it was being written
                if entry["step"] <= last_step:
                    self.entries.append(entry)
        write_atomic(path, "".join(json.dumps(e) + "\n" for e in self.entries).encode())

    def write(self, **entry: Any) -> None:
        """Append one line."""
        self.entries.append(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def plot(self, path: Path) -> None:
        """Draw loss against step: every entry, and a running mean over a twentieth of them."""
        from matplotlib.figure import Figure

        if not self.entries:
            return
        steps = [entry["step"] for entry in self.entries]
        losses = np.array([entry["loss"] for entry in self.entries])
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        # Figure instead of pyplot: no display, no global state.
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, losses, alpha=0.35, linewidth=1, label="log interval")
        axes.plot(steps[window - 1 :], smooth, linewidth=1.5, label="running mean")
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def to_uint8(images: Tensor) -> Tensor:
    """Round pixels in [-1, 1] to the nearest of the 256 levels, uint8 on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def image_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Lay uint8 images (N, C, H, W) out row by row, with a thin border, as one picture.

    Parameters
    ----------
    images : Tensor
        uint8, C = 1 (grey), 3 (RGB) or anything else (the first channel is shown).
    columns : int, optional
        Images per row; default: as square as it gets.
    """
    from PIL import Image

    num, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    zoom = max(1, math.ceil(_MIN_TILE / max(height, width)))
    tiles = images[:, : 3 if channels == 3 else 1].permute(0, 2, 3, 1).numpy()
    tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width, border = height * zoom, width * zoom, 2
    canvas = np.full(
        (rows * (height + border) + border, columns * (width + border) + border, tiles.shape[3]),
        255,
        np.uint8,
    )
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        top, left = border + row * (height + border), border + column * (width + border)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas)
