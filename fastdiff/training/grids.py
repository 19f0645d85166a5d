"""The grid of samples that a run draws of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.images import image_grid, to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastdiff.training.trainer import Trainer

# Images drawn at a time. The same for any number of processes, so that the grid is too.
_BATCH = 32


def draw(trainer: Trainer) -> Image:
    """Draw the grid from the first average of the weights: always from the same noise.

    All processes must call it; rank 0 gets the whole grid.
    """
    from fastdiff.samplers import DDIM

    config, device, averaged = trainer.config, trainer.device, trainer.averaged()
    height, width, channels = trainer.dataset.shape
    sampler = DDIM(trainer.diffusion, steps=config.sample_steps)
    keys = ops.sample_keys(trainer.seed_grid, config.num_samples, device=device)
    grid = torch.zeros(config.num_samples, channels, height, width, dtype=torch.uint8)

    def predict(x_t: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with trainer.autocast():
            return averaged(x_t, t, **kwargs).float()

    # No more at a time than are trained on at a time: what fits in memory there fits here.
    size = min(_BATCH, trainer.share // config.grad_accum)
    for indices in trainer.world.batches(config.num_samples, size):
        here = indices.to(device)
        model_kwargs = {}
        if config.class_cond:
            model_kwargs["y"] = here % trainer.unet.config.num_classes
        images = sampler.sample(
            predict,
            (len(indices), channels, height, width),
            seed=keys[here],
            model_kwargs=model_kwargs,
            progress=False,
            device=device,
        )
        grid[indices] = to_uint8(images)
    return image_grid(trainer.world.assemble(grid))
