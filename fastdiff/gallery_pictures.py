"""The pictures of ``python -m fastdiff.gallery``: one function each, from a scene to a picture."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import bound
from fastdiff.diffusion.guidance import ClassifierFree, ClassifierGuidance
from fastdiff.gallery_scene import STEPS, Scene
from fastdiff.gallery_sheet import sheet, tiles
from fastdiff.images import to_uint8
from fastdiff.reference.q_sample import pixels_from_uint8
from fastdiff.samplers import DDIM, DDPM, Frames, Inpainting, consistency, interpolate
from fastdiff.training.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# As many training images are searched for those nearest to a sample.
_MOST_SEARCHED = 60_000

# Etas and guidance scales that are compared.
ETAS = (0.0, 0.2, 0.5, 1.0)
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)


def forward(scene: Scene) -> Image.Image:
    """The forward process: x_t of real images, always the same noise."""
    images, *_ = scene.real(min(4, scene.num))
    schedule = scene.run.diffusion.schedule
    times = np.linspace(0, scene.timesteps - 1, 11).round().astype(int).tolist()
    x0, rows = images.to(scene.device), []
    for t in times:
        at = torch.full((len(x0),), t, device=scene.device)
        rows.append(to_uint8(scene.run.diffusion.q_sample(x0, at, seed=scene.seed)))
    labels = [f"t = {t + 1}\n{_db(float(schedule.snr[t]))}" for t in times]
    return sheet(
        [[image, *column] for image, *column in zip(images, *rows, strict=True)],
        "Forward process",
        "x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, with one eps per row (DDPM eq. 4); "
        "below t the signal-to-noise ratio.",
        column_labels=["x0\n", *labels],
    )


def denoising(scene: Scene) -> Image.Image:
    """The reverse process: x_t along one run of DDPM."""
    times, x_t, _ = _chain(scene)
    return sheet(
        _rows(x_t),
        "Reverse process: the state x_t",
        f"DDPM, {len(times)} of {scene.timesteps} steps (algorithm 2). Left noise, right the "
        "sample.",
        column_labels=[*_time(scene, times, len(x_t)), "x0"],
    )


def predictions(scene: Scene) -> Image.Image:
    """Progressive generation: the image that the network expects, along the same run."""
    times, _, x0 = _chain(scene)
    return sheet(
        _rows(x0),
        "Progressive generation: the predicted x0",
        "What the network takes the image to be at the states of the picture before (DDPM eq. 15, "
        "figure 6): coarse shape first, details last.",
        column_labels=_time(scene, times, len(x0)),
    )


def interpolation(scene: Scene) -> Image.Image:
    """Between two latents along the great circle."""
    rows, count = min(6, scene.num), 9
    x_T, labels = scene.noise(2 * rows), scene.labels(rows)
    ends = x_T[0::2], x_T[1::2]
    found = interpolate(
        DDIM(scene.run.diffusion, scene.steps),
        scene.run.unet,
        *ends,
        num=count,
        model_kwargs=scene.kwargs(labels.repeat(count)),
        progress=False,
    )
    steps = [to_uint8(images) for images in found]
    return sheet(
        _rows(steps),
        "Interpolation",
        f"slerp between two latents x_T, each decoded by DDIM with {scene.steps} steps and eta = 0 "
        "(DDIM section 5.3).",
        column_labels=[f"{k / (count - 1):.3g}" for k in range(count)],
    )


def steps(scene: Scene) -> Image.Image:
    """The same latents with more and more steps."""
    numbers = scene.some_steps((*STEPS, 200))
    x_T, labels = scene.noise(scene.num), scene.labels(scene.num)
    found = consistency(
        lambda S: DDIM(scene.run.diffusion, S),
        scene.run.unet,
        x_T,
        numbers,
        model_kwargs=scene.kwargs(labels),
        progress=False,
    )
    last = found[numbers[-1]]
    distances = [float(((found[S] - last) / 2).square().mean().sqrt()) for S in numbers]
    return sheet(
        [tiles(to_uint8(found[S])) for S in numbers],
        "Consistency",
        "Columns start from one latent each: DDIM with eta = 0 draws the same image whatever the "
        "number of steps S (DDIM section 5.2). Below S the root mean square distance to the last "
        "row, pixels in [0, 1].",
        row_labels=[f"S = {S}\n{d:.3f}" for S, d in zip(numbers, distances, strict=True)],
    )


def reconstruction(scene: Scene) -> Image.Image:
    """Encoded to latents and decoded again."""
    images, labels, _ = scene.real(scene.num)
    x0 = pixels_from_uint8(images.to(scene.device))
    rows, names = [tiles(images)], ["real"]
    for S in scene.some_steps():
        sampler = DDIM(scene.run.diffusion, S, clip_denoised=False)
        kwargs = {"model_kwargs": scene.kwargs(labels), "progress": False}
        x_T = sampler.encode(scene.run.unet, x0, **kwargs)
        back = sampler.decode(scene.run.unet, x_T, **kwargs)
        rows.append(tiles(to_uint8(back)))
        names.append(f"S = {S}\n{float(((back - x0) / 2).square().mean()):.1e}")
    return sheet(
        rows,
        "Encoding and decoding",
        "Real images to latents and back with S steps of DDIM each way (section 5.4). Below S the "
        "mean squared error, pixels in [0, 1], as in DDIM's Table 2.",
        row_labels=names,
    )


def continuations(scene: Scene) -> Image.Image:
    """What is decided at x_t: several ends of one beginning."""
    diffusion, count = scene.run.diffusion, min(8, scene.num)
    sampler = DDPM(diffusion, scene.steps, "trailing")
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(step: int, t: int, x_t: Tensor, pred_x0: Tensor) -> None:
        states[step] = x_t, pred_x0

    labels = scene.labels(4)[3:4] if scene.num_classes else scene.labels(1)
    scene.sample(sampler, scene.noise(1), labels, callback=keep)
    rows, names = [], []
    for share in (1.0, 0.75, 0.5, 0.25):
        taken = round((1 - share) * sampler.steps)
        left = sampler.indices[: sampler.steps - taken]
        x_t, pred_x0 = states[taken]
        ends = scene.sample(
            DDPM(diffusion, None, left),
            x_t.repeat(count, *[1] * (x_t.dim() - 1)),
            labels.repeat(count),
            seed=ops.sample_keys(scene.seed + 1, count, device=scene.device),
        )
        rows.append([*to_uint8(x_t), *to_uint8(pred_x0), *ends])
        names.append(f"t = {int(left[-1]) + 1}")
    return sheet(
        rows,
        "Continuations of one state",
        "Each row shares its x_t and goes on with other noise (DDPM figure 7). The later the state "
        "is shared, the less is left open.",
        row_labels=names,
        column_labels=["x_t", "pred. x0", *map(str, range(1, count + 1))],
    )


def eta(scene: Scene) -> Image.Image:
    """DDIM's noise against the number of steps."""
    numbers, each = scene.some_steps(), 3
    x_T, labels = scene.noise(each), scene.labels(each)
    settings = [({"eta": value}, f"eta = {value:g}") for value in ETAS]
    settings.append(({"sigma_hat": True}, "sigma_hat"))
    rows = [
        [
            image
            for S in numbers
            for image in scene.sample(DDIM(scene.run.diffusion, S, **options), x_T, labels)
        ]
        for options, _ in settings
    ]
    columns = [f"S = {S}" if k == each // 2 else "" for S in numbers for k in range(each)]
    return sheet(
        rows,
        "DDIM: eta and the number of steps",
        f"The same {each} latents in every cell. With few steps noise hurts: eta = 0 is best, "
        "DDPM's sigma_hat worst (DDIM table 1).",
        row_labels=[name for _, name in settings],
        column_labels=columns,
        groups=each,
    )


def inpainting(scene: Scene) -> Image.Image:
    """Parts of real images filled in."""
    count, rows, fills = min(5, scene.num), [], 5
    images, labels, _ = scene.real(count)
    height, width = images.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    masks = [
        y < height / 2,
        x < width / 2,
        (y - (height - 1) / 2).abs().maximum((x - (width - 1) / 2).abs()) > height / 4,
    ]
    for k in range(count):
        mask = masks[k % len(masks)]
        sampler = Inpainting(
            DDPM(scene.run.diffusion, scene.steps, "trailing"),
            pixels_from_uint8(images[k : k + 1].to(scene.device)),
            mask.to(scene.device),
            jump_length=max(1, scene.steps // 10),
            resamples=3,
        )
        found = scene.sample(sampler, scene.noise(fills), labels[k : k + 1].repeat(fills))
        shown = torch.where(mask, images[k], torch.full_like(images[k], 128))
        rows.append([images[k], shown, *found])
    return sheet(
        rows,
        "Inpainting",
        f"The grey part is drawn anew, {fills} times. DDPM with {scene.steps} steps, each group "
        "taken three times (RePaint).",
        column_labels=["real", "given", *(f"fill {k + 1}" for k in range(fills))],
    )


def classifier_free(scene: Scene) -> Image.Image:
    """Guidance by the network's own unconditional prediction."""
    unet = scene.run.unet.config
    if unet.num_classes is None or not unet.null_class:
        raise UserError(
            "needs a run trained with --class-cond and --label-dropout, whose network can also "
            "predict without a class"
        )
    count = min(unet.num_classes, 10)
    y = scene.labels(count)
    null = torch.full_like(y, unet.num_classes)
    rows = [
        tiles(
            scene.sample(
                DDIM(scene.run.diffusion, scene.steps),
                scene.noise(count),
                y,
                guidance=ClassifierFree(scale, {"y": null}),
            )
        )
        for scale in SCALES
    ]
    return sheet(
        rows,
        "Classifier-free guidance",
        "uncond + w (cond - uncond): w = 0 knows no class, w = 1 is the network as trained. One "
        f"latent per column; DDIM, {scene.steps} steps.",
        row_labels=[f"w = {scale:g}" for scale in SCALES],
        column_labels=_class_names(scene, count),
    )


def classifier(scene: Scene) -> Image.Image:
    """Guidance by the gradient of a classifier of noisy images."""
    from fastdiff.evaluation.guiding_classifier import guiding_classifier

    found = guiding_classifier(
        scene.run, scene.folder, lambda: scene.dataset, scene.device, scene.say
    )
    count = min(found.linear_out.out_features, 10)
    y = torch.arange(count, device=scene.device)
    # Of a class-conditional run the unconditional prediction, so that the gradient alone steers.
    unconditional = torch.full_like(y, scene.num_classes or 0)
    if scene.num_classes is not None and not scene.run.unet.config.null_class:
        unconditional = y
    rows = [
        tiles(
            scene.sample(
                DDIM(scene.run.diffusion, scene.steps),
                scene.noise(count),
                unconditional,
                guidance=ClassifierGuidance(found, y, scale, scene.run.diffusion),
            )
        )
        for scale in SCALES
    ]
    return sheet(
        rows,
        "Classifier guidance",
        "eps - s sqrt(1 - abar_t) grad log p(y | x_t), with a classifier trained on noisy images "
        f"(Dhariwal & Nichol, algorithm 2). One latent per column; DDIM, {scene.steps} steps.",
        row_labels=[f"s = {scale:g}" for scale in SCALES],
        column_labels=_class_names(scene, count),
    )


def neighbours(scene: Scene) -> Image.Image:
    """Samples beside the training images nearest to them: drawn, or remembered?"""
    count, nearest = min(6, scene.num), 5
    drawn = scene.sample(
        DDIM(scene.run.diffusion, scene.steps), scene.noise(count), scene.labels(count)
    )
    dataset = scene.dataset
    searched = min(len(dataset), _MOST_SEARCHED)
    all_images = torch.from_numpy(dataset.read(np.arange(searched)))
    pixels = all_images.flatten(1).float() / 255
    flat = drawn.permute(0, 2, 3, 1).flatten(1).float() / 255
    root = pixels.shape[1] ** 0.5
    distances, order = torch.cdist(flat, pixels).topk(min(nearest, len(pixels)), largest=False)
    real, *_ = scene.real(min(100, len(dataset)))
    own = torch.cdist(real.permute(0, 2, 3, 1).flatten(1).float() / 255, pixels)
    # The nearest to a real image is itself.
    usual = float(own.topk(min(2, len(pixels)), largest=False).values[:, -1].median()) / root
    rows = [
        [image, *all_images[found].permute(0, 3, 1, 2)]
        for image, found in zip(drawn, order, strict=True)
    ]
    return sheet(
        rows,
        "Nearest training images",
        f"Left samples, right of them those of {searched:,} training images at the least root mean "
        "square distance, "
        "pixels in [0, 1]. That of the nearest stands before the row; a training image has its own "
        f"nearest at {usual:.3f} (median): much less would be a copy.",
        row_labels=[f"{float(d[0]) / root:.3f}" for d in distances],
        column_labels=["sample", *map(str, range(1, order.shape[1] + 1))],
    )


def rate_distortion(scene: Scene) -> Image.Image:
    """What is known of an image after so many bits."""
    from PIL import Image

    images, labels, _ = scene.real(min(32, 4 * scene.num))
    x0, diffusion = images.to(scene.device), scene.run.diffusion
    kwargs = scene.kwargs(labels)
    strata = bound.timestep_strata(
        diffusion, scene.run.unet, x0, seed=scene.seed, model_kwargs=kwargs
    )
    bits = diffusion.bits_per_dim(
        scene.run.unet, x0, scene.seed, model_kwargs=kwargs, progress=False, strata=strata
    )
    picture = io.BytesIO()
    bits.rate_distortion().plot(picture)
    with Image.open(picture) as image:
        return image.convert("RGB").quantize(32)


PICTURES: dict[str, Callable[[Scene], Any]] = {
    function.__name__: function
    for function in (
        forward,
        denoising,
        predictions,
        continuations,
        interpolation,
        steps,
        reconstruction,
        eta,
        inpainting,
        classifier_free,
        classifier,
        neighbours,
        rate_distortion,
    )
}
"""Name -> what draws it."""


def _chain(scene: Scene) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Of one run of DDPM: all timesteps; x_t (the sample last) and predicted x0 of some."""
    count, columns = min(5, scene.num), 10
    every = Frames(), Frames(show="x_t")

    def keep(step: int, t: int, x_t: Tensor, pred_x0: Tensor) -> None:
        for frames in every:
            frames(step, t, x_t, pred_x0)

    sampler = DDPM(scene.run.diffusion, scene.steps, "trailing")
    end = scene.sample(sampler, scene.noise(count), scene.labels(count), callback=keep)
    at = _columns(len(every[0].times), columns)
    x0, x_t = ([frames.images[k] for k in at] for frames in every)
    return every[0].times, [*x_t, end], x0


def _columns(num: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(int)).tolist()


def _time(scene: Scene, times: list[int], count: int) -> list[str]:
    return [f"t = {times[k] + 1}" for k in _columns(len(times), 10)][:count]


def _rows(columns: list[Tensor]) -> list[list[Tensor]]:
    """Columns of images (N, C, H, W) each, as N rows."""
    return [list(row) for row in zip(*columns, strict=True)]


def _db(ratio: float) -> str:
    return f"{10 * np.log10(ratio):.0f} dB" if ratio > 1e-12 else "no signal"


def _class_names(scene: Scene, count: int) -> list[str]:
    names = scene.dataset.classes or [str(k) for k in range(count)]
    return [name.replace(" ", "\n").replace("/", "/\n") for name in names[:count]]
