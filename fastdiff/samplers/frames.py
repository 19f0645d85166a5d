"""Frames of a sampler at work: predicted x0 along the chain, as a strip or a GIF (DDPM §4.3)."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fastdiff._types import check_ints, check_name
from fastdiff.images import image_grid, to_uint8

SHOW = ("pred_x0", "x_t")


class Frames:
    """A callback that keeps pictures: `sampler.sample(..., callback=frames)` (DDPM §4.3, Math §7).

    Parameters
    ----------
    every
        Keep every so many steps; the last one is in any case among them if `every` divides S.
    show
        "pred_x0": what the model thinks the image is; "x_t": the state itself.

    Attributes
    ----------
    images : list of Tensor
        uint8 (B, C, H, W) on the CPU, in the order of the steps. One sample call after another
        appends; `clear` empties.
    times : list of int
        The t of each.

    Examples
    --------
    >>> import torch, fastdiff
    >>> diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(100))
    >>> frames = fastdiff.samplers.Frames(every=5)
    >>> sampler = fastdiff.samplers.DDIM(diffusion, 10, spacing="trailing")
    >>> x0 = sampler.sample(lambda x, t: 0 * x, (2, 1, 8, 8), progress=False, callback=frames)
    >>> frames.times
    [59, 9]
    """

    def __init__(self, every: int = 1, show: str = "pred_x0") -> None:
        check_ints(1, every=every)
        check_name("show", show, SHOW)
        self.every = every
        self.show = show
        self.clear()

    def clear(self) -> None:
        """Forget all frames."""
        self.images: list[Tensor] = []
        self.times: list[int] = []

    def __call__(self, step: int, t: int, x_t: Tensor, pred_x0: Tensor) -> None:
        if (step + 1) % self.every == 0:
            self.images.append(to_uint8(pred_x0 if self.show == "pred_x0" else x_t))
            self.times.append(t)

    def strip(self, path: str | Path, num: int | None = None) -> None:
        """Save a picture: one row per sample, one column per frame (`num` evenly spread ones)."""
        frames = self._some(num)
        rows = torch.stack(frames, 1).flatten(0, 1)
        image_grid(rows, columns=len(frames)).save(path)

    def gif(
        self, path: str | Path | BinaryIO, num: int | None = None, milliseconds: int = 100
    ) -> None:
        """Save an animation of the grid of samples; the last frame stays for a second."""
        pictures = [image_grid(frame) for frame in self._some(num)]
        durations = [milliseconds] * (len(pictures) - 1) + [max(1000, milliseconds)]
        pictures[0].save(
            path, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
        )

    def _some(self, num: int | None) -> list[Tensor]:
        if not self.images:
            raise ValueError("no frames yet: pass this object as callback to Sampler.sample")
        if num is not None:
            check_ints(1, num=num)
        if num is None or num >= len(self.images):
            return self.images
        # From the last frame, the result, backwards: it is the one shown if num = 1.
        last = len(self.images) - 1
        picked = [round(last * (num - 1 - i) / max(1, num - 1)) for i in range(num)]
        return [self.images[last - i] for i in picked]
