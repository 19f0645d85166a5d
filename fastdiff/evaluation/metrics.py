"""What ``python -m fastdiff.evaluate`` computes: one function per metric, from a task to a result.

Of several processes each works on its share of the images, and rank 0 has the whole.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import _cli, ops
from fastdiff.diffusion.bound import BitsPerDim, timestep_strata
from fastdiff.diffusion.likelihood import flow_likelihood
from fastdiff.evaluation.config import EvaluateConfig
from fastdiff.evaluation.frechet import frechet_distance
from fastdiff.evaluation.yardsticks import (
    MOST_IMAGES,
    Yardsticks,
    frechet_verdict,
    yardsticks,
)
from fastdiff.images import image_grid, not_finite
from fastdiff.training.data import Dataset
from fastdiff.training.distributed import World
from fastdiff.training.errors import RunError, naming
from fastdiff.training.trained import TrainedRun

# Images of the grid of samples.
_SHOWN = 64

_SAMPLE_STEPS = 50


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
    dataset: Dataset
    """All images."""
    data: str
    """Their name."""
    world: World
    """The processes that share the work."""

    @functools.cached_property
    def yardsticks(self) -> Yardsticks:
        """Trivial models, fitted to images that are not evaluated, as far as there are others."""
        order = np.random.default_rng(self.config.seed).permutation(len(self.dataset))
        others = order[len(self.x0) :] if len(order) > len(self.x0) else order
        fitted = self.dataset.read(np.sort(others[:MOST_IMAGES]))
        return yardsticks(fitted, self.x0.permute(0, 2, 3, 1).cpu().numpy(), self.config.seed)

    def share(self) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        """What this process works on: images, keys of their noise, model_kwargs, indices."""
        num = len(self.x0)
        here = torch.arange(num)[self.world.rank :: self.world.size].to(self.x0.device)
        keys = ops.sample_keys(self.config.seed, num, device=self.x0.device)
        kwargs = {name: value[here] for name, value in self.model_kwargs.items()}
        return self.x0[here], keys[here], kwargs, here

    def whole(self, metric: str, values: Tensor, here: Tensor) -> Tensor:
        """On rank 0, all processes' values (n, ...) in the order of the images, on the CPU.

        Raises
        ------
        RunError
            On rank 0, if some of them are not finite.
        """
        values = values.cpu()
        everything = values.new_zeros(len(self.x0), *values.shape[1:])
        everything[here.cpu()] = values
        everything = self.world.assemble(everything)
        bad = int(not_finite(everything.view(len(everything), -1)).sum())
        if bad and self.world.is_first:
            raise RunError(
                f"{metric}: {bad} of {len(everything)} images have a result that is not finite; "
                "nothing was written. The weights may have diverged (train with a lower --lr)"
            )
        return everything


@dataclass(frozen=True)
class Result:
    """What a metric found.

    Attributes
    ----------
    rows : list of (str, str)
        Name and value, for people.
    values : dict
        The same and more, for programs (JSON).
    pictures : dict
        Content of .png files, by name.
    """

    rows: list[tuple[str, str]]
    values: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)


def bpd(task: Task) -> Result:
    """The variational bound (Math §6), and progressive coding (Math §7)."""
    diffusion = task.run.diffusion
    x0, keys, kwargs, here = task.share()
    strata = timestep_strata(
        diffusion,
        task.run.unet,
        task.x0,  # not the share: all processes must choose the same
        task.config.bpd_timesteps or diffusion.num_timesteps,
        task.config.seed,
        max_batch=task.config.batch_size,
        model_kwargs=task.model_kwargs,
    )
    part = diffusion.bits_per_dim(
        task.run.unet,
        x0,
        seed=keys,
        max_batch=task.config.batch_size,
        model_kwargs=kwargs,
        progress=task.world.is_first,
        strata=strata,
    )
    names = ("total", "prior", "vb", "x0_mse", "eps_mse")
    bits = BitsPerDim(*(task.whole("--bpd", getattr(part, name), here) for name in names))
    curve = bits.rate_distortion()
    picture = io.BytesIO()
    curve.plot(picture)
    vb = bits.vb.double().mean(0)
    mean, error = _mean_and_error(bits.total)
    values = {
        "verdict": task.yardsticks.verdict(mean, error),
        "bits_per_dim": mean,
        "standard_error": error,
        **_trivial(task.yardsticks),
        "timesteps_per_image": len(strata),
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
        ("verdict on the bound", values["verdict"]),
        ("bits/dim, variational bound", f"{mean:.4f} +- {error:.4f}"),
        *((f"  of {name}", f"{bits:.4f}") for name, bits in task.yardsticks.named()),
        ("  terms computed per image", f"{len(strata)} of {diffusion.num_timesteps}"),
        (f"  prior L_T (terminal SNR {values['terminal_snr']:.2g})", f"{values['prior']:.4f}"),
        ("  L_1 .. L_{T-1}", f"{float(vb[1:].sum()):.4f}"),
        ("  decoder L_0", f"{values['decoder']:.4f}"),
        ("  RMSE (0..255) of x0 predicted from x_1", f"{float(curve.distortion[-2]):.2f}"),
    ]
    return Result(rows, values, {"rate_distortion": picture.getvalue()})


def likelihood(task: Task) -> Result:
    """Likelihood of the probability flow (Math §6), of uniformly dequantized images."""
    config = task.config
    x0, keys, kwargs, here = task.share()
    try:
        flow = flow_likelihood(
            task.run.diffusion,
            task.run.unet,
            x0,
            keys,
            probes=config.probes,
            dequantize=True,
            rtol=config.tolerance,
            atol=config.tolerance,
            max_batch=config.batch_size,
            model_kwargs=kwargs,
            progress=task.world.is_first,
        )
    except RuntimeError as error:
        raise RunError(f"--likelihood: {error} (--tolerance); nothing was written") from error
    names = ("bits_per_dim", "standard_error", "evaluations")
    results = {name: getattr(flow, name) for name in names}
    if config.probes == 1:  # has no error that could be known
        results["standard_error"] = torch.zeros_like(flow.standard_error)
    bits, of_probes, evaluations = (
        task.whole("--likelihood", values, here) for values in results.values()
    )
    mean, error = _mean_and_error(bits)
    # Independent between images, so that the error of the mean falls with their number too.
    probes = float(of_probes.square().sum().sqrt()) / len(task.x0) if config.probes > 1 else None
    values = {
        "verdict": task.yardsticks.verdict(mean, error),
        "bits_per_dim": mean,
        "standard_error": error,
        **_trivial(task.yardsticks),
        "standard_error_of_the_probes": probes,
        "evaluations": float(evaluations.double().mean()),
    }
    noise = "unknown from one" if probes is None else f"{probes:.4f}"
    rows = [
        ("verdict on the likelihood", values["verdict"]),
        ("bits/dim, probability flow", f"{mean:.4f} +- {error:.4f}"),
        ("  of that noise of the probes", noise),
        ("  evaluations of the flow per image", f"{values['evaluations']:.0f}"),
    ]
    return Result(rows, values)


def reconstruction(task: Task) -> Result:
    """Error of decode(encode(x0)) per dimension, pixels scaled to [0, 1] (DDIM Table 2)."""
    from fastdiff.reference.q_sample import pixels_from_uint8
    from fastdiff.samplers import DDIM

    diffusion, model = task.run.diffusion, task.run.unet
    images, _, model_kwargs, here = task.share()
    errors = {}
    for steps in sorted(set(task.config.steps)):
        if steps > diffusion.num_timesteps:
            break
        sampler = DDIM(diffusion, steps=steps, clip_denoised=False)
        squares = []
        for part in torch.arange(len(images), device=here.device).split(task.config.batch_size):
            kwargs = {name: value[part] for name, value in model_kwargs.items()}
            x0 = pixels_from_uint8(images[part])
            x_T = sampler.encode(model, x0, model_kwargs=kwargs)
            again = sampler.sample(model, x_T=x_T, model_kwargs=kwargs)
            squares.append(((again - x0) / 2).square().flatten(1).mean(1))
        errors[steps] = float(
            task.whole("--reconstruction", torch.cat(squares), here).double().mean()
        )
    rows = [("reconstruction error per dimension", "")]
    rows += [(f"  {steps} steps", f"{error:.2e}") for steps, error in errors.items()]
    return Result(rows, {"steps": list(errors), "mse": list(errors.values())})


def frechet(task: Task) -> Result:
    """Frechet distance of samples to real images, beside that of as many real images (the floor).

    The real images are split: N stand where the samples do, all others are what both are compared
    with. So a model that draws from the distribution of the data would reach the floor, up to
    chance. Samples are rounded to the 256 levels that real images have.
    """
    from fastdiff.evaluation.features import extractor
    from fastdiff.sample import generate
    from fastdiff.samplers import from_name

    config, run, world = task.config, task.run, task.world
    num = config.samples
    order = np.random.default_rng((config.seed, num)).permutation(len(task.dataset))
    held_out, reference = order[:num], order[num:]
    steps = config.sample_steps or min(_SAMPLE_STEPS, run.diffusion.num_timesteps)
    options = {"eta": config.eta} if config.sampler == "ddim" else {}
    with naming("--sampler, --sample-steps or --eta"):
        sampler = from_name(config.sampler, run.diffusion, steps=steps, **options)
    labels = None
    if run.unet.config.num_classes is not None:
        labels = torch.from_numpy(task.dataset.labels[held_out])  # in the data's proportions
    device = task.x0.device
    found = []
    # Before the long part, which it may show to be in vain.
    world.first(
        lambda: found.append(
            extractor(config.features, task.dataset, task.data, task.folder, device, _cli.say)
        )
    )
    drawing = run.computed(config.amp, config.channels_last, config.compile)
    levels = generate(
        drawing,
        sampler,
        num,
        config.seed,
        labels,
        config.batch_size,
        world=world,
        cuda_graph=config.cuda_graph,
    )
    if not world.is_first:
        return Result([], {})
    (extract,) = found
    picture = io.BytesIO()
    shown = None if labels is None else labels[:_SHOWN]
    image_grid(levels[:_SHOWN], labels=shown).save(picture, "png")

    real = extract.of_dataset(task.dataset, reference, device)
    floor = frechet_distance(extract.of_dataset(task.dataset, held_out, device), real)
    distance = frechet_distance(extract.of_images(levels.to(device)), real)
    # Features that are the same for every image leave no floor.
    ratio = distance / floor if floor else None
    values = {
        "verdict": frechet_verdict(ratio),
        "frechet_distance": distance,
        "real_vs_real": floor,
        "ratio": ratio,
        "num": len(levels),  # not --num
        "num_reference": len(reference),
        "features": extract.name,
        "feature_dimensions": real.shape[1],
        **{f"features_{name}": value for name, value in extract.facts.items()},
        "sampler": config.sampler,
        "sampler_steps": sampler.steps,
        **options,
        "pixels": "rounded to uint8",
    }
    rows = [
        ("verdict on the samples", values["verdict"]),
        (
            f"Frechet distance, {num} samples",
            f"{distance:.4g} ({'no floor' if ratio is None else f'{ratio:.3g} x the floor'})",
        ),
        (f"  the floor: {num} real images", f"{floor:.4g}"),
        (f"  both to {len(reference)} other real images", "pixels rounded to uint8"),
        ("  features", f"{real.shape[1]} of {extract.name}{_accuracy(extract.facts)}"),
    ]
    return Result(rows, values, {"frechet": picture.getvalue()})


def _accuracy(facts: dict[str, Any]) -> str:
    if "accuracy" not in facts:
        return ""
    return f" (right about {facts['accuracy']:.0%} of images it was not trained on)"


METRICS: dict[str, Callable[[Task], Result]] = {
    "bpd": bpd,
    "likelihood": likelihood,
    "reconstruction": reconstruction,
    "frechet": frechet,
}
"""Every metric has a flag of its name, and writes a JSON file of that name."""


def _trivial(found: Yardsticks) -> dict[str, Any]:
    """The yardsticks, for programs."""
    values = {"uniform": found.uniform, "pixels": found.pixels, "gaussian": found.gaussian}
    return {"levels_of_the_data": found.levels} | {
        f"bits_per_dim_{name}": value for name, value in values.items()
    }


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over images, and its standard error (0 for one image)."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), error


def unsuited(task: Task, name: str) -> str | None:
    """Why a metric cannot be had of these images, None if it can."""
    most = len(task.dataset) // 2
    if name == "frechet" and most < 2:
        return f"--frechet needs at least 4 images, and {task.data} has {len(task.dataset)}"
    if name == "frechet" and task.config.samples > most:
        return (
            f"--samples {task.config.samples}: --frechet needs twice as many real images, and "
            f"{task.data} has {len(task.dataset)}; give at most {most}"
        )
    if name == "frechet" and task.config.features == "classifier" and task.dataset.num_classes < 2:
        return (
            f"--frechet: {task.data} has no classes to train features on; give --features "
            "module:function or inception"
        )
    return None
