"""The grid of samples that a run draws of itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.images import image_grid, not_finite, to_uint8
from fastdiff.training.files import read_file
from fastdiff.training.state import TrainState

if TYPE_CHECKING:
    from PIL.Image import Image


# Images drawn at a time. The same for any number of processes, so that the grid is too.
_BATCH = 32


def is_whole(path: Path) -> bool:
    """Whether there is a picture, not cut off."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_file(path)), formats=("PNG",)) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def draw(run: TrainState) -> tuple[Image | None, int]:
    """Draw the grid from the first average of the weights: always from the same noise.

    All processes must call it; rank 0 gets the whole grid. None if pixels of it are not finite;
    and the number of images that have such.
    """
    from fastdiff.samplers import DDIM

    config, device, averaged = run.config, run.device, run.averaged()
    height, width, channels = run.dataset.shape
    sampler = DDIM(run.diffusion, steps=min(config.sample_steps, config.timesteps))
    keys = ops.sample_keys(run.seed_grid, config.num_samples, device=device)
    grid = torch.zeros(config.num_samples, channels, height, width, dtype=torch.uint8)
    bad = torch.zeros(config.num_samples, dtype=torch.uint8)

    def predict(x_t: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with run.autocast():
            return averaged(x_t, t, **kwargs).float()

    # No more at a time than are trained on at a time: what fits in memory there fits here.
    size = min(_BATCH, run.share // config.grad_accum)
    for indices in run.world.batches(config.num_samples, size):
        here = indices.to(device)
        model_kwargs = {}
        if config.class_cond:
            model_kwargs["y"] = here % run.unet.config.num_classes
        images = sampler.sample(
            predict,
            (len(indices), channels, height, width),
            seed=keys[here],
            model_kwargs=model_kwargs,
            progress=False,
            device=device,
        )
        bad[indices] = not_finite(images).to(bad)
        grid[indices] = to_uint8(images.nan_to_num())
    bad, grid = run.world.assemble(bad), run.world.assemble(grid)
    found = int(bad.sum())
    labels = None
    if config.class_cond:
        labels = torch.arange(config.num_samples) % run.unet.config.num_classes
    return None if found else image_grid(grid, labels=labels), found
