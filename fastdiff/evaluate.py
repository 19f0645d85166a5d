"""``python -m fastdiff.evaluate RUN``: how good is a trained run? All metrics, or those asked for.

--bpd: the variational bound on -log2 p(x) per dimension, its terms, and the rate-distortion curve.
--likelihood: the same quantity as the probability flow has it, a second estimate.
--reconstruction: the error that DDIM's encoding and decoding leave, by number of steps.

Results are printed, and written to RUN/evaluation/, one JSON file per metric (and a plot of the
curve) that holds its settings and that the next evaluation replaces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import _cli
from fastdiff.likelihood import flow_likelihood
from fastdiff.training.checkpoint import write_atomic
from fastdiff.training.errors import RunError, UserError
from fastdiff.training.run import TrainedRun, choose_device, load_run, use_threads

PROGRAM = "python -m fastdiff.evaluate"
NEEDS = ("tyro", "yaml", "tqdm", "safetensors", "PIL", "matplotlib", "sklearn")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Field docstrings are the help texts of ``python -m fastdiff.evaluate``."""

    run: str
    """Run folder, e.g. runs/digits."""
    bpd: bool = False
    """Variational bound in bits/dim, every term of it, and the rate-distortion curve."""
    likelihood: bool = False
    """Bits/dim of the probability flow (of dequantized images)."""
    reconstruction: bool = False
    """Mean squared error, pixels scaled to [0, 1], after encoding and decoding with DDIM."""
    data: str | None = None
    """Images to evaluate on, as --data of fastdiff.train; None: those that the run was trained on,
    which flatter it."""
    data_dir: str | None = None
    """Folder that holds the files of fashion-mnist or cifar10; None: as in the run."""
    num: int = 64
    """Number of images, drawn at random from the data."""
    seed: int = 0
    """Seed of that choice and of all noise."""
    ema: float | None = None
    """Which of the run's averages of its weights, by its decay; None: the first."""
    batch_size: int = 256
    """How much the U-Net sees at a time, counted in images; changes memory and speed alone."""
    probes: int = 2
    """--likelihood: random probes of the divergence per image; more of them less noise."""
    tolerance: float = 1e-4
    """--likelihood: relative and absolute error that the solver allows per step."""
    steps: tuple[int, ...] = (10, 20, 50, 100)
    """--reconstruction: numbers of DDIM steps, as far as the run has as many timesteps."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU when there is one."""


@dataclass(frozen=True)
class Task:
    """What every metric works on."""

    config: EvaluateConfig
    run: TrainedRun
    x0: Tensor
    """uint8 (N, C, H, W) on the device."""
    model_kwargs: dict[str, Tensor]
    """Class labels (N,) of a class-conditional run."""
    folder: Path
    """Where results are written."""


@dataclass(frozen=True)
class Result:
    """What a metric found.

    Attributes
    ----------
    rows : list of (str, str)
        Name and value, for people.
    values : dict
        The same and more, for programs (JSON).
    """

    rows: list[tuple[str, str]]
    values: dict[str, Any]


def bpd(task: Task) -> Result:
    """The variational bound (SPEC §6), and progressive coding (SPEC §7)."""
    diffusion = task.run.diffusion
    bits = diffusion.bits_per_dim(
        task.run.unet,
        task.x0,
        seed=task.config.seed,
        max_batch=task.config.batch_size,
        model_kwargs=task.model_kwargs,
    )
    curve = bits.rate_distortion()
    curve.plot(task.folder / "rate_distortion.png")
    vb = bits.vb.double().mean(0)
    mean, error = _mean_and_error(bits.total)
    values = {
        "bits_per_dim": mean,
        "standard_error": error,
        "prior": float(bits.prior.mean()),
        "terminal_snr": diffusion.schedule.terminal_snr,
        "decoder": float(vb[0]),
        "vb": vb.tolist(),
        "x0_mse": bits.x0_mse.double().mean(0).tolist(),
        "eps_mse": bits.eps_mse.double().mean(0).tolist(),
        "rate": curve.rate.tolist(),
        "distortion": curve.distortion.tolist(),
    }
    rows = [
        ("bits/dim, variational bound", f"{mean:.4f} +- {error:.4f}"),
        (f"  prior L_T (terminal SNR {values['terminal_snr']:.2g})", f"{values['prior']:.4f}"),
        ("  L_1 .. L_{T-1}", f"{float(vb[1:].sum()):.4f}"),
        ("  decoder L_0", f"{values['decoder']:.4f}"),
        ("  RMSE (0..255) of x0 predicted from x_1", f"{float(curve.distortion[-2]):.2f}"),
    ]
    return Result(rows, values)


def likelihood(task: Task) -> Result:
    """Likelihood of the probability flow (SPEC §6), of uniformly dequantized images."""
    config = task.config
    try:
        flow = flow_likelihood(
            task.run.diffusion,
            task.run.unet,
            task.x0,
            config.seed,
            probes=config.probes,
            dequantize=True,
            rtol=config.tolerance,
            atol=config.tolerance,
            max_batch=config.batch_size,
            model_kwargs=task.model_kwargs,
        )
    except RuntimeError as error:
        raise RunError(f"--likelihood: {error} (--tolerance)") from error
    mean, error = _mean_and_error(flow.bits_per_dim)
    # Independent between images, so that the error of the mean falls with their number too.
    probes = float(flow.standard_error.square().sum().sqrt()) / len(task.x0)
    values = {
        "bits_per_dim": mean,
        "standard_error": error,
        "standard_error_of_the_probes": None if math.isnan(probes) else probes,
        "evaluations": float(flow.evaluations.double().mean()),
    }
    of_probes = "unknown from one" if math.isnan(probes) else f"{probes:.4f}"
    rows = [
        ("bits/dim, probability flow", f"{mean:.4f} +- {error:.4f}"),
        ("  of that noise of the probes", of_probes),
        ("  evaluations of the flow per image", f"{values['evaluations']:.0f}"),
    ]
    return Result(rows, values)


def reconstruction(task: Task) -> Result:
    """Error of decode(encode(x0)) per dimension, pixels scaled to [0, 1] (DDIM Table 2)."""
    from fastdiff.reference.q_sample import pixels_from_uint8
    from fastdiff.samplers import DDIM

    diffusion, model = task.run.diffusion, task.run.unet
    errors = {}
    for steps in sorted(set(task.config.steps)):
        if steps > diffusion.num_timesteps:
            break
        sampler = DDIM(diffusion, steps=steps, clip_denoised=False)
        squares = []
        for part in torch.arange(len(task.x0), device=task.x0.device).split(task.config.batch_size):
            kwargs = {name: value[part] for name, value in task.model_kwargs.items()}
            x0 = pixels_from_uint8(task.x0[part])
            x_T = sampler.encode(model, x0, model_kwargs=kwargs)
            again = sampler.sample(model, x_T=x_T, model_kwargs=kwargs)
            squares.append(((again - x0) / 2).square().flatten(1).mean(1))
        errors[steps] = float(torch.cat(squares).double().mean())
    rows = [("reconstruction error per dimension", "")]
    rows += [(f"  {steps} steps", f"{error:.2e}") for steps, error in errors.items()]
    return Result(rows, {"steps": list(errors), "mse": list(errors.values())})


METRICS: dict[str, Callable[[Task], Result]] = {
    "bpd": bpd,
    "likelihood": likelihood,
    "reconstruction": reconstruction,
}
"""Every metric has a flag of its name, and writes a JSON file of that name."""


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
    task = _prepare(config)
    chosen = [name for name in METRICS if getattr(config, name)] or list(METRICS)
    for name in chosen:
        result = METRICS[name](task)
        values = {"metric": name, **_settings(task), **result.values}
        path = task.folder / f"{name}.json"
        try:
            write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())
        except OSError as error:
            raise RunError(f"{path}: cannot write: {error.strerror}") from error
        for title, value in result.rows:
            print(f"{title:48}{value}", flush=True)
    _cli.say(
        f"step {task.run.step} of {config.run} (--ema {task.run.ema}), {len(task.x0)} images of "
        f"{_data(task)}"
        f"{'' if config.data else ' (which it was trained on)'}: {task.folder}"
    )
    return 0


def _validate(config: EvaluateConfig) -> None:
    for name, least in (("num", 1), ("batch_size", 2), ("probes", 1)):
        if getattr(config, name) < least:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(config, name)}: give a number of at least {least}")
    if not 0 < config.tolerance < 1:
        raise UserError(f"--tolerance {config.tolerance}: give a number between 0 and 1")
    if not config.steps or min(config.steps) < 1:
        raise UserError(f"--steps {' '.join(map(str, config.steps))}: give numbers of at least 1")


def _prepare(config: EvaluateConfig) -> Task:
    from fastdiff.training.data import load_dataset

    run = load_run(config.run, choose_device(config.device), _cli.say, config.ema)
    use_threads(run.config)
    timesteps = run.diffusion.num_timesteps
    if min(config.steps) > timesteps:
        raise UserError(
            f"--steps {min(config.steps)}: {config.run} has timesteps for 1..{timesteps}"
        )
    data, data_dir = config.data, config.data_dir or run.config.data_dir
    if data is None:
        dataset = load_dataset(run.config.data, data_dir, run.config.image_size)
    else:
        size = run.image_shape[-1] if Path(data).is_dir() else None
        dataset = load_dataset(data, data_dir, size)
    height, width, channels = dataset.shape
    if (channels, height, width) != run.image_shape:
        c, h, w = run.image_shape
        raise UserError(
            f"--data {data}: images of {height}x{width}x{channels}, but {config.run} was trained "
            f"on {h}x{w}x{c}"
        )
    if config.num > len(dataset):
        raise UserError(f"--num {config.num}: there are {len(dataset)} images")
    chosen = np.random.default_rng(config.seed).permutation(len(dataset))[: config.num]
    device = next(run.unet.parameters()).device
    x0 = torch.from_numpy(dataset.read(chosen)).permute(0, 3, 1, 2).contiguous().to(device)
    model_kwargs = {}
    if run.unet.config.num_classes is not None:
        if dataset.labels is None:
            raise UserError(f"--data {data}: {config.run} is class-conditional and needs classes")
        model_kwargs["y"] = torch.from_numpy(dataset.labels[chosen]).to(device)
    folder = Path(config.run) / "evaluation"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot write: {error.strerror}") from error
    return Task(config, run, x0, model_kwargs, folder)


def _data(task: Task) -> str:
    return task.config.data or task.run.config.data


def _settings(task: Task) -> dict[str, Any]:
    """What decides on the result."""
    config = task.config
    return {
        "step": task.run.step,
        "ema": task.run.ema,
        "data": _data(task),
        "training_images": config.data is None,
        "num": config.num,
        "seed": config.seed,
    }


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over images, and its standard error (0 for one image)."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), error


if __name__ == "__main__":
    _cli.run(PROGRAM, main, NEEDS)
