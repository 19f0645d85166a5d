"""How long a run will take and how much memory: measured on a few steps that change nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastdiff._progress import duration
from fastdiff.training.logging import memory_mib

if TYPE_CHECKING:
    from fastdiff.training.trainer import Trainer

# Shorter runs are over before it is known how long they take.
_FEWEST_STEPS = 50

# What is measured ends after so many seconds, with one step at least behind the first.
_SECONDS, _MOST_STEPS = 3.0, 6

_LONG, _FIRST_LOOK = 1800.0, 300.0


@dataclass(frozen=True)
class Estimate:
    """What is expected of the rest of a run.

    Attributes
    ----------
    seconds : float
        Steps and sample grids together.
    seconds_per_step : float
        Of one optimizer step.
    memory_mib : int
        Highest so far, with the optimizer's state to come: tensors on a GPU, the process on a CPU.
    steps : int
        Those that are left.
    """

    seconds: float
    seconds_per_step: float
    memory_mib: int
    steps: int

    def __str__(self) -> str:
        """For people, with a shorter run to try if this one is long."""
        text = (
            f"about {duration(self.seconds)} at the speed that this machine has now "
            f"({self.seconds_per_step:.2g} s a step), {max(0.1, self.memory_mib / 1024):.1f} GiB "
            "of memory"
        )
        if self.seconds > _LONG:
            look = max(100, round(_FIRST_LOOK / self.seconds_per_step, -2))
            text += f"; --steps {look:.0f} for a first look"
        return text


def estimate(trainer: Trainer) -> Estimate | None:
    """Time a few forward and backward passes of a trainer, whose state stays as it is.

    None where that would mislead or cost much: several processes, a compiled U-Net, or less than 50
    steps left.
    """
    config, device = trainer.config, trainer.device
    steps = config.steps - trainer.step
    if trainer.world.size > 1 or config.compile or config.fsdp or steps < _FEWEST_STEPS:
        return None
    size = trainer.share // config.grad_accum
    images = trainer.dataset.read(np.arange(size) % len(trainer.dataset))
    x0 = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    if not config.channels_last:
        x0 = x0.contiguous()
    kwargs = {}
    if trainer.unet.config.dropout:
        kwargs["dropout_keys"] = torch.arange(size, device=device)
    if config.class_cond:
        kwargs["y"] = torch.zeros(size, dtype=torch.int64, device=device)
    t = torch.arange(size, device=device) % trainer.diffusion.num_timesteps
    times: list[float] = []
    while len(times) < 2 or (len(times) < _MOST_STEPS and sum(times) < _SECONDS):
        start = time.perf_counter()
        losses = trainer.diffusion.training_losses(
            trainer._predict, x0, t, seed=0, model_kwargs=kwargs
        )
        losses["loss"].mean().backward()
        float(losses["loss"][0].detach())  # waits for the device
        times.append(time.perf_counter() - start)
    trainer.optimizer.zero_grad(set_to_none=True)
    # The first step makes what the others find.
    step = config.grad_accum * float(np.median(times[1:]))
    # A forward pass is a third of both, and a grid asks for one per image and step.
    grids = steps // config.sample_every + 1
    passes = grids * config.num_samples * min(config.sample_steps, config.timesteps)
    seconds = steps * step + passes * step / (3 * config.batch_size)
    # Adam's two numbers for each weight.
    state = 8 * sum(p.numel() for p in trainer.parameters) >> 20
    return Estimate(seconds, step, memory_mib(device) + state, steps)
