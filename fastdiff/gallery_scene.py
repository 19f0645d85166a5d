"""What the pictures of ``python -m fastdiff.gallery`` are made of: a run, its images, its noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.images import to_uint8
from fastdiff.training.trained import TrainedRun

if TYPE_CHECKING:
    from fastdiff.training.data import Dataset

# Numbers of steps that are compared, as many as a process has.
STEPS = (5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Scene:
    """What every picture is made of.

    Attributes
    ----------
    run : TrainedRun
        The model and its process.
    load : callable
        Gives the run's images; called by pictures that show real ones.
    folder : Path
        Where a classifier for guidance is kept.
    device : torch.device
        Where the model is.
    num : int
        Images beside each other.
    steps : int
        Steps of the samplers, where they are not what is compared.
    seed : int
        Seed of all noise and of the choice of real images.
    say : callable
        Is told what takes long.
    """

    run: TrainedRun
    load: Callable[[], Dataset]
    folder: Path
    device: torch.device
    num: int
    steps: int
    seed: int
    say: Callable[[str], None]

    @functools.cached_property
    def dataset(self) -> Dataset:
        """All of the run's images."""
        return self.load()

    @property
    def timesteps(self) -> int:
        """T."""
        return self.run.diffusion.num_timesteps

    @property
    def num_classes(self) -> int | None:
        """Of a class-conditional run."""
        return self.run.unet.config.num_classes

    def shape(self, num: int) -> tuple[int, ...]:
        """That of a batch of ``num`` images."""
        return (num, *self.run.image_shape)

    def labels(self, num: int) -> Tensor:
        """All classes in turn."""
        return torch.arange(num, device=self.device) % (self.num_classes or 1)

    def kwargs(self, labels: Tensor) -> dict[str, Tensor]:
        """The model's arguments for these classes, if it takes any."""
        return {} if self.num_classes is None else {"y": labels}

    def noise(self, num: int) -> Tensor:
        """x_T of images 0, 1, ...: the same in all pictures."""
        return ops.philox_normal(self.shape(num), self.seed, device=self.device)

    def sample(self, sampler: Any, x_T: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """uint8 images of latents."""
        return to_uint8(
            sampler.sample(
                self.run.unet,
                x_T=x_T,
                seed=options.pop("seed", self.seed),
                model_kwargs=self.kwargs(labels),
                progress=False,
                **options,
            )
        )

    def real(self, num: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """Images uint8 (N, C, H, W) chosen at random, of all classes in turn, and their labels."""
        dataset = self.dataset
        order = np.random.default_rng(self.seed).permutation(len(dataset))
        if dataset.labels is not None:
            # One of every class before the second of any.
            rank = np.empty(len(dataset), np.int64)
            for label in range(dataset.num_classes):
                of_class = order[dataset.labels[order] == label]
                rank[of_class] = np.arange(len(of_class))
            order = order[np.lexsort((dataset.labels[order], rank[order]))]
        chosen = order[:num]
        images = torch.from_numpy(dataset.read(chosen)).permute(0, 3, 1, 2).contiguous()
        labels = (
            np.zeros(len(chosen), np.int64) if dataset.labels is None else dataset.labels[chosen]
        )
        return images, torch.from_numpy(labels).to(self.device), chosen

    def some_steps(self, among: Iterable[int] = STEPS) -> list[int]:
        """Those numbers of steps that the process has; at least one."""
        return [s for s in among if s <= self.timesteps] or [self.timesteps]
