"""``python -m fastdiff.evaluate RUN``: how good is a trained run? All metrics, or those asked for.

--bpd: the variational bound on -log2 p(x) per dimension, its terms, and the rate-distortion curve,
beside what trivial models reach.
--likelihood: the same quantity as the probability flow has it, a second estimate.
--reconstruction: the error that DDIM's encoding and decoding leave, by number of steps.
--frechet: the Frechet distance of samples to real images, beside that of as many real images.

Results are printed, shown in RUN/report.html, and written to RUN/evaluation/, one JSON file per
metric (and pictures) that holds its settings and that the next evaluation replaces. ``torchrun
--nproc-per-node N -m -- fastdiff.evaluate RUN`` shares the images out to N processes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff import _cli
from fastdiff.evaluation.config import EvaluateConfig
from fastdiff.evaluation.metrics import METRICS, Task, unsuited
from fastdiff.samplers import SAMPLERS
from fastdiff.training import report
from fastdiff.training.config import check_numbers
from fastdiff.training.distributed import World
from fastdiff.training.errors import RunError, UserError, printable
from fastdiff.training.files import write_atomic
from fastdiff.training.run import RunFolder, choose_device, use_threads
from fastdiff.training.trained import load_run

PROGRAM = "python -m fastdiff.evaluate"

# What is evaluated, as far as there are so many images.
_NUM, _SAMPLES, _STEPS = 64, 500, (10, 20, 50, 100)
NEEDS = ("tyro", "yaml", "tqdm", "safetensors", "PIL", "matplotlib", "sklearn")


def main(argv: list[str]) -> int:
    """Evaluate as ``argv`` says; return the exit code."""
    import tyro

    config = _cli.parse(
        EvaluateConfig,
        argv,
        PROGRAM,
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),  # RUN is the only one
    )
    _validate(config)
    world = World.from_environment()
    say = _cli.say if world.is_first else _say_nothing
    device = choose_device(config.device, world)
    with world.joined(device):
        task = _prepare(config, device, world, say)
        _evaluate(task, say)
    return 0


def _evaluate(task: Task, say: Callable[[str], None]) -> None:
    config = task.config
    chosen = [name for name in METRICS if getattr(config, name)]
    for name in chosen or METRICS:
        reason = unsuited(task, name)
        if reason is not None:
            if chosen:
                raise UserError(reason)
            say(f"left out: {reason}")
            continue
        result = METRICS[name](task)
        if not task.world.is_first:
            continue
        values = {"metric": name, **_settings(task), **result.values}
        text = json.dumps(_finite(name, values), indent=2) + "\n"
        _write(task.folder / f"{name}.json", text.encode())
        for title, content in result.pictures.items():
            _write(task.folder / f"{title}.png", content)
        for title, value in result.rows:
            print(printable(f"{title:48}{value}"), flush=True)
    if task.world.is_first:
        path = report.write(RunFolder(Path(config.run)), say)
        say(
            f"step {task.run.step} of {printable(config.run)} (--ema {task.run.ema}), images of "
            f"{printable(task.data)}{' (which it was trained on)' if _seen(config) else ''}: "
            f"{printable(task.folder)}, {printable(path)}"
        )


def _validate(config: EvaluateConfig) -> None:
    check_numbers(config)
    least = {
        "num": 1,
        "bpd_timesteps": 2,
        "batch_size": 2,
        "probes": 1,
        "samples": 2,
        "sample_steps": 1,
    }
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value}: give a number of at least {smallest}")
    if config.sampler not in SAMPLERS:
        raise UserError(f"--sampler {config.sampler!r}: give one of {', '.join(SAMPLERS)}")
    if not 0 < config.tolerance < 1:
        raise UserError(f"--tolerance {config.tolerance}: give a number between 0 and 1")
    if config.steps is not None and (not config.steps or min(config.steps) < 1):
        raise UserError(f"--steps {' '.join(map(str, config.steps))}: give numbers of at least 1")


def _prepare(
    config: EvaluateConfig, device: torch.device, world: World, say: Callable[[str], None]
) -> Task:
    from fastdiff.training.data import load_dataset

    run = load_run(config.run, device, say, config.ema)
    run.unet.use_inference_form = config.inference_form
    use_threads(run.config)
    if config.cuda_graph and device.type != "cuda":
        raise UserError(f"--cuda-graph: needs a GPU, not --device {device.type}")
    timesteps = run.diffusion.num_timesteps
    if config.steps is None:
        steps = tuple(s for s in _STEPS if s <= timesteps) or (timesteps,)
        config = dataclasses.replace(config, steps=steps)
    if min(config.steps) > timesteps:
        raise UserError(
            f"--steps {min(config.steps)}: {config.run} has timesteps for 1..{timesteps}"
        )
    data = run.config.data if config.data is None else config.data
    size = run.config.image_size
    if config.data is not None:
        size = run.image_shape[-1] if os.path.isdir(data) or data.startswith("hf:") else None
    split = "test" if config.test_images else "train"
    data_dir = config.data_dir or run.config.data_dir
    dataset = load_dataset(data, data_dir, size, run.config.image_channels, split=split, warn=say)
    height, width, channels = dataset.shape
    if (channels, height, width) != run.image_shape:
        c, h, w = run.image_shape
        raise UserError(
            f"--data {data}: images of {height}x{width}x{channels}, but {config.run} was trained "
            f"on {h}x{w}x{c}"
        )
    if config.num is None or _frechet_alone(config):
        config = dataclasses.replace(config, num=min(config.num or _NUM, len(dataset)))
    if config.samples is None:
        config = dataclasses.replace(config, samples=min(_SAMPLES, len(dataset) // 2))
    if config.num > len(dataset):
        raise UserError(f"--num {config.num}: there are {len(dataset)} images")
    if config.num < world.size and not _frechet_alone(config):
        raise UserError(f"--num {config.num}: give at least one per process, {world.size}")
    chosen = np.random.default_rng(config.seed).permutation(len(dataset))[: config.num]
    x0 = torch.from_numpy(dataset.read(chosen)).permute(0, 3, 1, 2).contiguous().to(device)
    model_kwargs = {}
    if run.unet.config.num_classes is not None:
        if dataset.labels is None:
            raise UserError(f"--data {data}: {config.run} is class-conditional and needs classes")
        if dataset.num_classes > run.unet.config.num_classes:
            raise UserError(
                f"--data {data}: {dataset.num_classes} classes, but {config.run} was trained with "
                f"{run.unet.config.num_classes}"
            )
        model_kwargs["y"] = torch.from_numpy(dataset.labels[chosen]).to(device)
    folder = Path(config.run) / "evaluation"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot write: {error.strerror}") from error
    return Task(config, run, x0, model_kwargs, folder, dataset, data, world)


def _frechet_alone(config: EvaluateConfig) -> bool:
    """Whether nothing is asked for that --num concerns."""
    return [name for name in METRICS if getattr(config, name)] == ["frechet"]


def _seen(config: EvaluateConfig) -> bool:
    """Whether the run was trained on these images."""
    return config.data is None and not config.test_images


def _say_nothing(message: str) -> None:
    """What rank 0 says, the other processes need not repeat."""


def _finite(metric: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values, if every number is finite: others are no result."""
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        bad = sum(isinstance(v, float) and not math.isfinite(v) for v in numbers)
        if bad:
            raise RunError(
                f"--{metric}: {bad} of {len(numbers)} numbers of its {name} are not finite; the "
                "result was not written"
            )
    return values


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        raise RunError(f"{path}: cannot write: {error.strerror}") from error


def _settings(task: Task) -> dict[str, Any]:
    """What decides on the result."""
    config = task.config
    return {
        "step": task.run.step,
        "ema": task.run.ema,
        "data": task.data,
        "training_images": _seen(config),
        "test_images": config.test_images,
        "num": config.num,
        "seed": config.seed,
    }


if __name__ == "__main__":
    _cli.run(PROGRAM, main, NEEDS)
