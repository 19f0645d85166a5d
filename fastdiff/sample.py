"""``python -m fastdiff.sample RUN``: draw images from a trained run.

The run folder is all it needs. Image k depends on --seed and k alone, not on --num or
--batch-size.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from fastdiff import _cli, ops
from fastdiff.images import image_grid, to_uint8
from fastdiff.training.checkpoint import write_atomic
from fastdiff.training.errors import RunError, UserError, naming
from fastdiff.training.run import TrainedRun, choose_device, load_run, use_threads

if TYPE_CHECKING:
    from fastdiff.samplers import Sampler

PROGRAM = "python -m fastdiff.sample"
NEEDS = ("tyro", "tqdm", "safetensors", "PIL")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Field docstrings are the help texts of ``python -m fastdiff.sample``."""

    run: str
    """Run folder, e.g. runs/digits."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """How to sample."""
    steps: int = 50
    """Number of timesteps visited, out of those the run was trained with."""
    eta: float = 0.0
    """DDIM only: 0 is deterministic, 1 adds as much noise as DDPM."""
    spacing: str = "leading"
    """Which timesteps are visited: leading, linspace, trailing, quadratic, logsnr, or IDDPM
    sections such as "100,50,25" (which set the number of steps themselves)."""
    num: int = 64
    """Number of images."""
    seed: int = 0
    """Seed of the noise."""
    class_label: int | None = None
    """Class-conditional runs: the class of every image; None: all classes in turn."""
    batch_size: int = 256
    """Images at a time; changes memory and speed, not the images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU when there is one."""
    out: str | None = None
    """Where to write: a picture of all images (.png, .jpg), or an .npz with arr_0, uint8
    (N, H, W, C), and for class-conditional runs arr_1, the classes. None: a .png in RUN/samples."""
    force: bool = False
    """Overwrite --out if it exists."""


def main(argv: list[str]) -> int:
    """Sample as ``argv`` says; return the exit code."""
    import tyro

    config = _cli.parse(
        SampleConfig,
        argv,
        PROGRAM,
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),  # RUN is the only one
    )
    _validate(config)
    out = _output(config)
    run = load_run(config.run, choose_device(config.device), warn=_cli.say)
    use_threads(run.config)
    sampler = _sampler(config, run)
    labels = _labels(config, run)
    images = generate(run, sampler, config.num, config.seed, labels, config.batch_size)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, _encode(out.suffix.lower(), images, labels))
    except OSError as error:
        raise RunError(f"--out {out}: cannot write: {error.strerror}") from error
    _cli.say(f"{config.num} images of step {run.step} of {config.run}: {out}")
    return 0


def generate(
    run: TrainedRun,
    sampler: Sampler,
    num: int,
    seed: int = 0,
    labels: torch.Tensor | None = None,
    batch_size: int = 256,
) -> torch.Tensor:
    """Draw ``num`` images, uint8 (num, C, H, W) on the CPU, under a progress bar.

    Parameters
    ----------
    labels : Tensor, optional
        int64 (num,): the images' classes, for a class-conditional run.
    """
    from tqdm import tqdm

    device = next(run.unet.parameters()).device
    keys = ops.sample_keys(seed, num, device=device)
    parts = []
    with tqdm(total=num * sampler.steps, unit="image step", unit_scale=True) as bar:
        for part in keys.split(batch_size):
            first = sum(map(len, parts))
            kwargs = {}
            if labels is not None:
                kwargs["y"] = labels[first : first + len(part)].to(device)
            images = sampler.sample(
                run.unet,
                (len(part), *run.image_shape),
                seed=part,
                model_kwargs=kwargs,
                progress=False,
                callback=lambda step, t, x_t, pred_x0: bar.update(len(x_t)),
            )
            parts.append(to_uint8(images))
    return torch.cat(parts)


def _validate(config: SampleConfig) -> None:
    for name in ("steps", "num", "batch_size"):
        if getattr(config, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(config, name)}: give a number of at least 1")
    if config.sampler == "ddpm" and config.eta != 0:
        raise UserError(f"--eta {config.eta} belongs to --sampler ddim; leave it out for ddpm")


def _output(config: SampleConfig) -> Path:
    if config.out is None:
        out = Path(config.run) / "samples" / _default_name(config)
    else:
        out = Path(config.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".npz"):
        raise UserError(f"--out {out}: give a name that ends in .png, .jpg or .npz")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file")
    if out.exists() and not config.force:
        raise UserError(f"--out {out} exists; add --force to overwrite it, or give another name")
    return out


def _default_name(config: SampleConfig) -> str:
    """Name everything that decides on the images, as far as it is not the default."""
    name = f"{config.sampler}-{config.steps}-seed-{config.seed}"
    for field in ("eta", "spacing", "class_label", "num"):
        value = getattr(config, field)
        if value != getattr(SampleConfig, field):
            name += f"-{field.removesuffix('_label')}-{value}"
    return name + ".png"


def _sampler(config: SampleConfig, run: TrainedRun) -> Sampler:
    from fastdiff.samplers import DDIM, DDPM

    sections = config.spacing.replace(",", "").isdigit()
    steps = None if sections else config.steps
    with naming("--steps, --spacing or --eta"):
        if config.sampler == "ddpm":
            return DDPM(run.diffusion, steps=steps, spacing=config.spacing)
        return DDIM(run.diffusion, steps=steps, eta=config.eta, spacing=config.spacing)


def _labels(config: SampleConfig, run: TrainedRun) -> torch.Tensor | None:
    num_classes = run.unet.config.num_classes
    if num_classes is None:
        if config.class_label is not None:
            raise UserError(f"--class-label: {config.run} was trained without --class-cond")
        return None
    if config.class_label is None:
        return torch.arange(config.num) % num_classes
    if not 0 <= config.class_label < num_classes:
        raise UserError(f"--class-label {config.class_label}: give one of 0..{num_classes - 1}")
    return torch.full((config.num,), config.class_label)


def _encode(suffix: str, images: torch.Tensor, labels: torch.Tensor | None) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".npz":
        arrays = [images.permute(0, 2, 3, 1).numpy()]
        arrays += [] if labels is None else [labels.numpy()]
        np.savez_compressed(buffer, *arrays)
    else:
        image_grid(images).save(buffer, "PNG" if suffix == ".png" else "JPEG")
    return buffer.getvalue()


if __name__ == "__main__":
    _cli.run(PROGRAM, main, NEEDS)
