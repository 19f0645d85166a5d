"""``python -m fastdiff.sample RUN``: draw images from a trained run.

The run folder is all it needs. Image k depends on --seed and k alone, not on --num or
--batch-size. ``torchrun --nproc-per-node N -m -- fastdiff.sample RUN`` shares the batches out to N
processes, which draw the same images bit for bit. (The -- keeps torchrun from reading --num.)
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff import _cli, ops
from fastdiff._known_images import known_image, known_mask
from fastdiff._progress import progress
from fastdiff._sample_config import SampleConfig
from fastdiff.diffusion.guidance import (
    ClassifierFree,
    ClassifierGuidance,
    DynamicThresholding,
    Guidance,
)
from fastdiff.images import image_grid, not_finite, to_uint8
from fastdiff.nn import NoisyClassifier
from fastdiff.samplers import SAMPLERS, Frames, Inpainting, Sampler, from_name
from fastdiff.training.archives import memory_bytes
from fastdiff.training.config import check_numbers
from fastdiff.training.distributed import World
from fastdiff.training.errors import RunError, UserError, naming, printable
from fastdiff.training.files import write_atomic
from fastdiff.training.run import choose_device, use_threads
from fastdiff.training.trained import TrainedRun, load_run, training_images

PROGRAM = "python -m fastdiff.sample"
NEEDS = ("tyro", "tqdm", "safetensors", "PIL")

# Timesteps visited, unless somebody says how many.
STEPS = 50

# Fields that belong to one sampler, and its option.
_OF_ONE_SAMPLER = {
    "step_size": ("annealed_langevin", "step_size"),
    "sde_method": ("reverse_sde", "method"),
}
_INNER_STEPS = {"annealed_langevin": "inner_steps", "predictor_corrector": "corrector_steps"}


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
    _check_suffix(config)
    world = World.from_environment()
    device = choose_device(config.device, world)
    say = _cli.say if world.is_first else _say_nothing
    run = load_run(config.run, device, say, config.ema)
    run.unet.use_inference_form = config.inference_form
    run = run.computed(config.amp, config.channels_last, config.compile)
    if config.cuda_graph and device.type != "cuda":
        raise UserError(f"--cuda-graph: needs a GPU, not --device {device.type}")
    if config.steps is None:
        config = dataclasses.replace(config, steps=min(STEPS, run.diffusion.num_timesteps))
    out = _output(config)
    use_threads(run.config)
    _check_memory(config, run)
    sampler = _sampler(config, run, say)
    classifier = _classifier(config, run, device, world, say)
    labels = _labels(config, run, classifier)
    guidance = _guidance(config, run, classifier)
    frames = Frames() if out.suffix.lower() == ".gif" else None
    if frames is not None and world.size > 1:
        raise UserError(f"--out {out}: an animation is drawn by one process, not {world.size}")
    with world.joined(device):
        images = generate(
            run,
            sampler,
            config.num,
            config.seed,
            labels,
            config.batch_size,
            guidance,
            frames,
            world,
            cuda_graph=config.cuda_graph,
        )
    if not world.is_first:
        return 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, _encode(out.suffix.lower(), images, labels, frames, sampler))
    except OSError as error:
        raise RunError(f"--out {out}: cannot write: {error.strerror}") from error
    _cli.say(
        f"{config.num} images of step {run.step} of {printable(config.run)} (--ema {run.ema}): "
        f"{printable(out)}"
    )
    return 0


def generate(
    run: TrainedRun,
    sampler: Sampler,
    num: int,
    seed: int = 0,
    labels: torch.Tensor | None = None,
    batch_size: int = 256,
    guidance: Callable[[torch.Tensor | None], Guidance | None] = lambda labels: None,
    frames: Frames | None = None,
    world: World = World(),  # noqa: B008 (frozen)
    *,
    cuda_graph: bool = False,
) -> torch.Tensor:
    """Draw ``num`` images, uint8 (num, C, H, W) on the CPU, under a progress bar.

    Of several processes each draws every world.size-th batch, and rank 0 gets all images.

    Raises
    ------
    RunError
        On rank 0, if pixels are not finite.

    Parameters
    ----------
    labels : Tensor, optional
        int64 (num,): the images' classes; a class-conditional run is given them, and guidance.
    guidance : callable
        The guidance of a batch, given its labels.
    frames : Frames, optional
        Keeps the predictions of every step, batch after batch.
    cuda_graph : bool
        As of `Sampler.sample`.
    """
    device = next(run.unet.parameters()).device
    keys = ops.sample_keys(seed, num, device=device)
    drawn = torch.zeros(num, *run.image_shape, dtype=torch.uint8)
    bad = torch.zeros(num, dtype=torch.uint8)
    batches = world.batches(num, batch_size)
    total = sum(map(len, batches)) * len(sampler._order())

    def watch(step: int, t: int, x_t: torch.Tensor, pred_x0: torch.Tensor) -> None:
        bar.update(len(x_t))
        if frames is None:
            return
        try:
            frames(step, t, x_t, pred_x0)
        except ValueError as error:
            raise RunError(f"t = {t}: {error}; nothing was written") from error

    with progress(total, "image step", show=world.is_first, unit_scale=True) as bar:
        for part in batches:
            kwargs, y = {}, None
            if labels is not None:
                y = labels[part].to(device)
                if run.unet.config.num_classes is not None:
                    kwargs["y"] = y
            images = sampler.sample(
                run.unet,
                (len(part), *run.image_shape),
                seed=keys[part.to(device)],
                guidance=guidance(y),
                model_kwargs=kwargs,
                progress=False,
                callback=watch,
                cuda_graph=cuda_graph,
            )
            bad[part] = not_finite(images).to(bad)
            drawn[part] = to_uint8(images.nan_to_num())
    found = int(world.assemble(bad).sum())
    if found and world.is_first:
        raise RunError(
            f"{found} of {num} images have pixels that are not finite; nothing was written. The "
            "weights may have diverged (train with a lower --lr)"
        )
    return world.assemble(drawn)


def _say_nothing(message: str) -> None:
    """What rank 0 says, the other processes need not repeat."""


def _validate(config: SampleConfig) -> None:
    check_numbers(config)
    for name in ("steps", "num", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value}: give a number of at least 1")
    if config.sampler not in SAMPLERS:
        raise UserError(f"--sampler {config.sampler!r}: give one of {', '.join(SAMPLERS)}")
    if config.sampler != "ddim" and config.eta != 0:
        raise UserError(
            f"--eta {config.eta} belongs to --sampler ddim; leave it out for {config.sampler}"
        )
    if config.inner_steps is not None and config.sampler not in _INNER_STEPS:
        raise UserError(
            f"--inner-steps {config.inner_steps} belongs to --sampler "
            f"{' or '.join(_INNER_STEPS)}; leave it out for {config.sampler}"
        )
    if config.sampler != "ddim" and config.sigma_hat:
        raise UserError(f"--sigma-hat belongs to --sampler ddim; leave it out for {config.sampler}")
    for field, (sampler, _) in _OF_ONE_SAMPLER.items():
        if getattr(config, field) is not None and config.sampler != sampler:
            raise UserError(
                f"--{field.replace('_', '-')} {getattr(config, field)} belongs to --sampler "
                f"{sampler}; leave it out for {config.sampler}"
            )
    if (config.image is None) != (config.mask is None):
        raise UserError("--image and --mask go together: the image, and what of it is drawn anew")
    if config.resamples < 1:
        raise UserError(f"--resamples {config.resamples}: give a number of at least 1")
    if config.resamples > 1 and config.image is None:
        raise UserError(f"--resamples {config.resamples} needs --image")
    if config.classifier_scale is not None and config.guidance_scale is not None:
        raise UserError("--classifier-scale and --guidance-scale: give one of them")
    if config.guidance_rescale and config.guidance_scale is None:
        raise UserError(f"--guidance-rescale {config.guidance_rescale} needs --guidance-scale")


def _check_suffix(config: SampleConfig) -> None:
    kinds = (".png", ".jpg", ".jpeg", ".gif", ".npz")
    if config.out is not None and Path(config.out).suffix.lower() not in kinds:
        raise UserError(f"--out {config.out}: give a name that ends in .png, .jpg, .gif or .npz")


def _check_memory(config: SampleConfig, run: TrainedRun) -> None:
    """What is drawn is kept; that it does not fit should be known before the first image."""
    keys, pixels, there = 8 * config.num, config.num * math.prod(run.image_shape), memory_bytes()
    if there is not None and keys + pixels > there:
        raise RunError(
            f"out of memory (--num {config.num}: {keys} bytes for the keys of the noise, {pixels} "
            f"for the images; there are {there}); draw them in parts, each with another --seed"
        )


def _output(config: SampleConfig) -> Path:
    if config.out is None:
        out = Path(config.run) / "samples" / _default_name(config)
    else:
        out = Path(config.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file")
    if out.exists() and not config.force:
        raise UserError(f"--out {out} exists; add --force to overwrite it, or give another name")
    return out


def _default_name(config: SampleConfig) -> str:
    """Name everything that decides on the images, as far as it is not the default."""
    name = f"{config.sampler}-{config.steps}-seed-{config.seed}"
    for field in (
        "ema",
        "eta",
        "spacing",
        "sigma_hat",
        "inner_steps",
        "step_size",
        "sde_method",
        "image",
        "mask",
        "resamples",
        "classifier_scale",
        "guidance_scale",
        "guidance_rescale",
        "dynamic_threshold",
        "amp",
        "class_label",
        "num",
    ):
        value = getattr(config, field)
        if value != getattr(SampleConfig, field):
            value = re.sub(r"[^\w.]+", "-", str(value))  # --image and --mask may be paths
            name += f"-{field.removesuffix('_label').replace('_', '-')}-{value}"
    return name[:200] + ".png"


def _sampler(config: SampleConfig, run: TrainedRun, say: Callable[[str], None]) -> Sampler:
    sections = (config.spacing or "").replace(",", "").isdigit()
    options: dict[str, Any] = {"steps": None if sections else config.steps}
    if config.spacing is not None:
        options["spacing"] = config.spacing
    if config.sampler == "ddim":
        options["eta"] = config.eta
        options["sigma_hat"] = config.sigma_hat
    if config.inner_steps is not None:
        options[_INNER_STEPS[config.sampler]] = config.inner_steps
    for field, (_, option) in _OF_ONE_SAMPLER.items():
        if getattr(config, field) is not None:
            options[option] = getattr(config, field)
    with naming("--steps, --spacing, --eta, --inner-steps, --step-size or --sde-method"):
        sampler = from_name(config.sampler, run.diffusion, **options)
    if config.image is None:
        return sampler
    known, mask = known_image(run, config.image, say), known_mask(run, config.mask)
    device = next(run.unet.parameters()).device
    with naming("--sampler or --resamples"):
        return Inpainting(
            sampler,
            known.to(device),
            mask.to(device),
            jump_length=max(1, sampler.steps // 10),
            resamples=config.resamples,
        )


def _guidance(
    config: SampleConfig, run: TrainedRun, classifier: NoisyClassifier | None
) -> Callable[[torch.Tensor | None], Guidance | None]:
    """What makes the guidance of a batch from its labels."""
    unet = run.unet.config
    if config.guidance_scale is not None and unet.num_classes is None:
        raise UserError(f"--guidance-scale: {config.run} was trained without --class-cond")
    if config.guidance_scale not in (None, 1) and not unet.null_class:
        raise UserError(
            f"--guidance-scale: {config.run} was trained with --label-dropout 0, so that it has no "
            "unconditional prediction"
        )

    made: dict[int | None, Guidance | None] = {}

    def of(labels: torch.Tensor | None) -> Guidance | None:
        """One for all batches of a size: a CUDA graph belongs to its guidance."""
        if classifier is not None:
            return make(labels)
        size = None if labels is None else len(labels)
        if size not in made:
            made[size] = make(labels)
        return made[size]

    def make(labels: torch.Tensor | None) -> Guidance | None:
        guidance = None
        if config.guidance_scale is not None:
            null = torch.full_like(labels, unet.num_classes)
            guidance = ClassifierFree(config.guidance_scale, {"y": null}, config.guidance_rescale)
        if classifier is not None:
            guidance = ClassifierGuidance(
                classifier, labels, config.classifier_scale, run.diffusion
            )
        if config.dynamic_threshold is not None:
            guidance = DynamicThresholding(run.diffusion, config.dynamic_threshold, guidance)
        return guidance

    with naming("--guidance-rescale or --dynamic-threshold"):
        make(torch.zeros(1, dtype=torch.int64))
    return of


def _classifier(
    config: SampleConfig,
    run: TrainedRun,
    device: torch.device,
    world: World,
    say: Callable[[str], None],
) -> NoisyClassifier | None:
    """What --classifier-scale guides with."""
    if config.classifier_scale is None:
        return None
    from fastdiff.evaluation.guiding_classifier import guiding_classifier

    if world.size > 1:
        raise UserError("--classifier-scale: images are drawn by one process, not several")
    with naming("--classifier-scale"):
        return guiding_classifier(
            run, Path(config.run), lambda: training_images(run, warn=say), device, say
        )


def _labels(
    config: SampleConfig, run: TrainedRun, classifier: NoisyClassifier | None
) -> torch.Tensor | None:
    num_classes = run.unet.config.num_classes
    if num_classes is None and classifier is not None:
        num_classes = classifier.linear_out.out_features
    if num_classes is None:
        if config.class_label is not None:
            raise UserError(
                f"--class-label: {config.run} was trained without --class-cond; --classifier-scale "
                "guides such a run towards a class"
            )
        return None
    if config.class_label is None:
        return torch.arange(config.num) % num_classes
    if not 0 <= config.class_label < num_classes:
        raise UserError(f"--class-label {config.class_label}: give one of 0..{num_classes - 1}")
    return torch.full((config.num,), config.class_label)


def _encode(
    suffix: str,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    frames: Frames | None,
    sampler: Sampler,
) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".npz":
        arrays = [images.permute(0, 2, 3, 1).numpy()]
        arrays += [] if labels is None else [labels.numpy()]
        np.savez_compressed(buffer, *arrays)
    elif frames is not None:
        # Batch after batch of S frames each: the frames of one step become one picture.
        S = len(sampler._order())
        frames.images = [torch.cat(frames.images[k::S]) for k in range(S)]
        frames.gif(buffer)
    else:
        image_grid(images, labels=labels).save(buffer, "PNG" if suffix == ".png" else "JPEG")
    return buffer.getvalue()


if __name__ == "__main__":
    _cli.run(PROGRAM, main, NEEDS)
