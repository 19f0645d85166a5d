"""The defaults of a run on images of one's own: what their size and number and the machine allow.

The recipe for a folder is made when its images are known, by timing a small network on them: the
largest network that gets through enough steps in an hour, and as many steps as the hour allows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.training.config import BUILT_IN_DATA, TrainConfig
from fastdiff.training.run import build_unet

if TYPE_CHECKING:
    from fastdiff.nn import UNet
    from fastdiff.training.data import Dataset

# What a run of one's own may take if nobody says.
_SECONDS = 3600.0
_FEWEST_STEPS, _MOST_STEPS = 2000, 50_000
# How often the run may see each image: more, and a network learns a small folder by heart.
_MOST_EPOCHS = 2000

# What measuring may take, two passes at least.
_MEASURING = 5.0

# By the size of the images, up to which: presets from the largest to the smallest.
_PRESETS: dict[int, tuple[str, ...]] = {
    16: ("digits",),
    40: ("ddpm_cifar10", "mnist", "mnist_small"),
    96: ("ddim_celeba64", "small_64"),
    192: ("small_128",),
    1 << 14: ("ddpm_256", "small_128"),
}

FITTED = ("preset", "batch_size", "steps", "warmup", "sample_every", "checkpoint_every")
_CHOSEN = {"preset", "batch_size", "steps"}  # the others follow from these


def fit(
    config: TrainConfig,
    given: Collection[str],
    dataset: Dataset,
    device: torch.device,
    say: Callable[[str], None],
) -> TrainConfig:
    """``config`` with those of FITTED that are not ``given`` fitted to images and machine.

    Built-in data have recipes of their own, and stay as they are.
    """
    free = set(FITTED) - set(given)
    if config.data in BUILT_IN_DATA or not free:
        return config
    changes: dict[str, object] = {}
    if "batch_size" in free:
        changes["batch_size"] = _batch_size(max(dataset.shape[:2]))
    names = _candidates(dataset.shape) if "preset" in free else (config.preset,)
    if not names:  # no preset takes images of this size, which building the network says
        return config
    if not {"preset", "steps"} <= set(given):
        steps = None if "steps" in free else config.steps
        found = _largest(dataclasses.replace(config, **changes), names, steps, dataset, device)
        changes |= {n: v for n, v in found.items() if n in free}
    fitted = dataclasses.replace(config, **changes)
    tenth = max(1, fitted.steps // 10)
    changes |= {
        "warmup": min(config.warmup, tenth),
        "sample_every": max(100, tenth),
        "checkpoint_every": max(100, tenth),
    }
    config = dataclasses.replace(config, **{n: v for n, v in changes.items() if n in free})
    if not _CHOSEN & free:
        return config
    height, width, _ = dataset.shape
    flags = " ".join(f"--{n.replace('_', '-')} {getattr(config, n)}" for n in FITTED if n in free)
    count = f"{len(dataset):,} image{'s' * (len(dataset) > 1)} of {height}x{width}"
    say(f"chosen for {count} on this machine: {flags}")
    return config


def _largest(
    config: TrainConfig,
    names: tuple[str, ...],
    steps: int | None,
    dataset: Dataset,
    device: torch.device,
) -> dict[str, object]:
    """The first preset that gets through enough steps in time, or the last, and how many steps.

    The last and smallest is timed, the others are expected to take as long for an operation.
    """
    candidates = [dataclasses.replace(config, preset=name) for name in names]
    seconds = _seconds_per_image(candidates[-1], dataset, device) * config.batch_size
    operations = [_operations(candidate, dataset) for candidate in candidates]
    step = [seconds * count / operations[-1] for count in operations]
    # A few steps for a first look are of the network that a whole run would have.
    wanted = max(steps or 0, _FEWEST_STEPS)
    in_time = (i for i, s in enumerate(step) if s * wanted <= _SECONDS)
    chosen = next(in_time, len(names) - 1)
    epochs = _MOST_EPOCHS * len(dataset) // config.batch_size
    fitting = min(round(_SECONDS / step[chosen]), epochs, _MOST_STEPS)
    return {"preset": names[chosen], "steps": max(_FEWEST_STEPS, fitting) // 100 * 100}


def _batch_size(size: int) -> int:
    """64 images of 32x32, or as many pixels; a power of two from 8 to 64."""
    batch_size = 64
    while batch_size > 8 and batch_size * size**2 > 64 * 40**2:
        batch_size //= 2
    return batch_size


def _candidates(shape: tuple[int, int, int]) -> tuple[str, ...]:
    from fastdiff.nn import PRESETS

    height, width, _ = shape
    fitting = next(names for size, names in _PRESETS.items() if max(height, width) <= size)
    divisors = {name: PRESETS[name].size_divisor for name in fitting}
    return tuple(n for n, d in divisors.items() if height % d == 0 and width % d == 0)


def _operations(config: TrainConfig, dataset: Dataset) -> int:
    """Multiplications and additions of a forward pass of one image, counted without running it."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = build_unet(config, dataset.shape, dataset.num_classes)
        unet(*_inputs(unet, 1, dataset))
    return counter.get_total_flops()


def _seconds_per_image(config: TrainConfig, dataset: Dataset, device: torch.device) -> float:
    """Of a forward and a backward pass."""
    images = min(config.batch_size, 4 if max(dataset.shape[:2]) <= 128 else 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with torch.device(device):
            unet = build_unet(config, dataset.shape, dataset.num_classes)
            x, *others = _inputs(unet, images, dataset)
        if config.channels_last:
            unet, x = (v.to(memory_format=torch.channels_last) for v in (unet, x))
        times: list[float] = []
        while len(times) < 2 or (len(times) < 5 and sum(times) < _MEASURING / 2):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16"):
                loss = unet(x, *others).float().square().mean()
            loss.backward()
            float(loss.detach())  # waits for the device
            times.append(time.perf_counter() - start)
    return min(times[1:]) / images  # the first finds out what the others know


def _inputs(unet: UNet, images: int, dataset: Dataset) -> tuple[torch.Tensor, ...]:
    height, width, _ = dataset.shape
    x = torch.randn(images, unet.config.in_channels, height, width)
    t = torch.zeros(images, dtype=torch.int64)
    return (x, t) if unet.config.num_classes is None else (x, t, t)
