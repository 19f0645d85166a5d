"""The settings of ``python -m fastdiff.evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    frechet: bool = False
    """Frechet distance of --samples images drawn from the model to real ones."""
    data: str | None = None
    """Images to evaluate on, as --data of fastdiff.train; None: those that the run was trained on,
    which flatter it."""
    data_dir: str | None = None
    """Folder that holds the files of fashion-mnist or cifar10; None: as in the run."""
    test_images: bool = False
    """The test images that come with the data (fashion-mnist, cifar10, hf:NAME), which the run has
    not seen."""
    num: int | None = None
    """Number of images, drawn at random from the data (all metrics but --frechet); None: 64, or all
    if there are fewer."""
    seed: int = 0
    """Seed of that choice and of all noise."""
    ema: float | None = None
    """Which of the run's averages of its weights, by its decay; of a run with --posthoc-ema also
    any relative length up to 0.288 (0.05: of 5 % of the training). None: the first."""
    batch_size: int = 256
    """How much the U-Net sees at a time, counted in images; changes memory and speed alone."""
    bpd_timesteps: int | None = 100
    """--bpd: terms of the bound computed per image, drawn so that they stand for all (the error
    that this leaves is in the standard error); None: every timestep."""
    probes: int = 2
    """--likelihood: random probes of the divergence per image; more of them less noise."""
    tolerance: float = 1e-4
    """--likelihood: relative and absolute error that the solver allows per step."""
    steps: tuple[int, ...] | None = None
    """--reconstruction: numbers of DDIM steps, as far as the run has as many timesteps; None: 10,
    20, 50 and 100, or all that it has."""
    samples: int | None = None
    """--frechet: number of images drawn, and of real ones held against the others as the floor;
    None: 500, or half of the images."""
    sampler: str = "ddim"
    """--frechet: how to sample, as --sampler of fastdiff.sample."""
    sample_steps: int | None = None
    """--frechet: number of timesteps visited; None: 50, or all that the run has."""
    eta: float = 0.0
    """--frechet: DDIM's noise, 0 none, 1 as much as DDPM."""
    amp: Literal["off", "bf16", "fp16"] | None = None
    """--frechet: draw under autocast in bfloat16 or float16; None: as the run was trained. (The
    other metrics compute in float32.)"""
    channels_last: bool | None = None
    """--frechet: draw in channels_last memory format; None: as the run was trained."""
    compile: bool | None = None
    """--frechet: draw with a compiled U-Net; None: as the run was trained."""
    cuda_graph: bool = False
    """--frechet, on a GPU: launch the U-Net's hundreds of kernels as one."""
    inference_form: bool = True
    """On a CPU: compute the U-Net in its inference form (all metrics but --likelihood)."""
    features: str = "classifier"
    """--frechet: classifier (a small one, trained on the data once and kept in RUN/evaluation),
    inception (torchvision's, if its weights are there), module:function of yours that maps uint8
    (B, C, H, W) to (B, D), or the features.safetensors of another run."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU when there is one."""
