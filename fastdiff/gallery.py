"""``python -m fastdiff.gallery RUN``: the pictures of the diffusion papers, from a trained run.

forward: the forward process. denoising, predictions: the reverse process, as x_t and as the
predicted x0. continuations: what is decided at x_t. interpolation: slerp between latents. steps:
one latent, more and more steps. reconstruction: encoding and decoding. eta: DDIM's noise against
steps. inpainting. classifier_free, classifier: guidance over scales. neighbours: samples beside the
nearest training images. rate_distortion: progressive coding.

Each is a .png in RUN/gallery. Noise depends on --seed alone, so that pictures can be compared.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdiff import _cli
from fastdiff.gallery_pictures import PICTURES
from fastdiff.gallery_scene import Scene
from fastdiff.training.config import check_numbers
from fastdiff.training.errors import RunError, UserError, printable
from fastdiff.training.files import write_atomic
from fastdiff.training.run import choose_device, use_threads
from fastdiff.training.trained import load_run, training_images

PROGRAM = "python -m fastdiff.gallery"
NEEDS = ("tyro", "yaml", "tqdm", "safetensors", "PIL", "matplotlib", "sklearn")


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """Field docstrings are the help texts of ``python -m fastdiff.gallery``."""

    run: str
    """Run folder, e.g. runs/digits."""
    only: tuple[str, ...] | None = None
    """Names of pictures, as listed above; None: all that the run can give."""
    out: str | None = None
    """Folder for the pictures; None: RUN/gallery."""
    num: int = 8
    """Images beside each other, where nothing else decides on it."""
    steps: int = 50
    """Steps of the samplers where they are not what is compared (as many as the run has)."""
    seed: int = 0
    """Seed of all noise, and of the choice of real images."""
    data_dir: str | None = None
    """Folder that holds the files of fashion-mnist or cifar10; None: as in the run."""
    ema: float | None = None
    """Which of the run's averages of its weights, by its decay; of a run with --posthoc-ema also
    any relative length up to 0.288 (0.05: of 5 % of the training). None: the first."""
    amp: Literal["off", "bf16", "fp16"] | None = None
    """Compute under autocast in bfloat16 or float16; None: as the run was trained."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU when there is one."""


def main(argv: list[str]) -> int:
    """Draw the pictures that ``argv`` asks for; return the exit code."""
    import tyro

    config = _cli.parse(
        GalleryConfig,
        argv,
        PROGRAM,
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),  # RUN is the only one
    )
    _validate(config)
    device = choose_device(config.device)
    run = load_run(config.run, device, _cli.say, config.ema)
    use_threads(run.config)
    folder = Path(config.run) / "gallery" if config.out is None else Path(config.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there: {error.strerror}") from error
    scene = Scene(
        run.computed(config.amp),
        lambda: training_images(run, config.data_dir, _cli.say),
        Path(config.run),
        device,
        config.num,
        min(config.steps, run.diffusion.num_timesteps),
        config.seed,
        _cli.say,
    )
    for name in config.only or PICTURES:
        start = time.perf_counter()
        try:
            picture = PICTURES[name](scene)
        except UserError as error:
            if config.only:
                raise UserError(f"--only {name}: {error}") from error
            _cli.say(f"left out: {name}: {error}")
            continue
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            raise RunError(f"{name}: {error}; the weights may have diverged") from error
        content = io.BytesIO()
        picture.save(content, "PNG", optimize=True)
        path = folder / f"{name}.png"
        try:
            write_atomic(path, content.getvalue())
        except OSError as error:
            raise RunError(f"{path}: cannot write: {error.strerror}") from error
        print(printable(f"{path} ({time.perf_counter() - start:.1f} s)"), flush=True)
    return 0


def _validate(config: GalleryConfig) -> None:
    check_numbers(config)
    for name in ("num", "steps"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: give a number of at least 1")
    unknown = [name for name in config.only or () if name not in PICTURES]
    if unknown:
        raise UserError(f"--only {unknown[0]}: give one of {', '.join(PICTURES)}")


if __name__ == "__main__":
    _cli.run(PROGRAM, main, NEEDS)
