"""Every setting of a training run, in one dataclass that is also the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import reprlib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdiff.training.errors import UserError

# More than anybody needs; what a run folder from somebody else claims must not fill the machine.
_MOST = {
    "timesteps": 1_000_000,
    "threads": 1024,
    "image_size": 1 << 14,
    "batch_size": 1 << 20,
    "num_samples": 1 << 16,
    **dict.fromkeys(("steps", "warmup", "keep"), 10**12),
    **dict.fromkeys(("log_every", "sample_every", "checkpoint_every"), 10**12),
}

BUILT_IN_DATA = ("digits", "fashion-mnist", "cifar10")

# What --channels can convert images to.
COLORS = {"grey": 1, "rgb": 3}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run; the defaults train a small U-Net on 8x8 digits.

    Field docstrings are the help texts of ``python -m fastdiff.train``. `for_data` gives the
    defaults of another dataset.
    """

    data: str = "digits"
    """Images to learn: digits, fashion-mnist, cifar10, a folder of images (one subfolder per class,
    if it has classes), an .npz file (uint8, N x H x W x C), or hf:NAME (Hugging Face). The defaults
    below are those of the dataset chosen here; for images of your own, preset, batch size and
    number of steps are fitted to them and to an hour of this machine."""
    data_dir: str | None = None
    """Folder that holds the files of fashion-mnist (IDX) or cifar10; None: the usual places."""
    download: bool = False
    """Fetch fashion-mnist or cifar10 into --data-dir (None: data/) if its files are not there, with
    torchvision."""
    image_size: int | None = None
    """Resize and centre-crop the images of a folder or of hf to this many pixels; None: as they
    are."""
    channels: Literal["data", "preset", "grey", "rgb"] = "data"
    """Channels of images and U-Net. data: as many as the images have, whatever those of --preset;
    preset: those of --preset, images with others are an error (the default if you give --preset);
    grey, rgb: the images are converted."""
    flip: bool = False
    """Mirror every second image left to right at random."""
    class_cond: bool = False
    """Give the model each image's class."""
    label_dropout: float = 0.1
    """With --class-cond: how often the class is hidden, which classifier-free guidance needs."""

    preset: str = "digits"
    """Name of the U-Net's architecture."""
    timesteps: int = 1000
    """Number of diffusion steps T."""
    schedule: str = "cosine"
    """Noise schedule: linear, quadratic (or scaled_linear), constant, jsd, sigmoid, cosine."""
    prediction: str = "eps"
    """What the U-Net predicts: eps, x0, v, mean."""
    variance: str = "fixed_large"
    """Variance of the reverse step: fixed_large, fixed_small; or from the U-Net, which then has
    twice the output channels: learned, learned_range (train these with --loss hybrid)."""
    loss: str = "mse"
    """Training loss: mse, rescaled_mse, l1, huber; the variational bound: kl, rescaled_kl; mse and
    the bound's gradient for the variance: hybrid."""
    weighting: str | None = None
    """Weight of the error at each timestep: min_snr, snr, snr_plus_one, truncated_snr, p2, exact;
    None: the same everywhere."""
    self_conditioning: bool = False
    """Give the U-Net its own estimate of the image as further channels: in half of the training
    steps, and when sampling that of the step before."""
    timestep_sampler: str = "uniform"
    """How timesteps are drawn: uniform, or loss_second_moment (more often where the loss is large,
    with weights that make up for it; meant for --loss kl)."""

    steps: int = 700
    """Optimizer steps of the whole run."""
    batch_size: int = 64
    """Images per optimizer step, over all micro-batches."""
    grad_accum: int = 1
    """Split each batch into this many micro-batches to save memory; the result is the same up to
    rounding."""
    lr: float = 2e-3
    """Highest learning rate."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """AdamW, or Adam, whose weight decay is part of the gradient."""
    beta1: float = 0.9
    """Decay of the optimizer's mean of gradients."""
    beta2: float = 0.999
    """Decay of the optimizer's mean of squared gradients."""
    warmup: int = 100
    """Steps over which the learning rate rises from zero."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: stay, or fall to zero along a cosine by the last step."""
    weight_decay: float = 0.0
    """Weight decay: decoupled with adamw, L2 with adam."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down to it."""
    ema: tuple[float, ...] = (0.99,)
    """Decays of the averaged weights, each warmed up from 0.1; several are kept side by side. Grids
    are drawn from the first, fastdiff.sample takes any of them."""
    posthoc_ema: bool = False
    """Keep two averages more, from which one of any length is made afterwards (EDM2): --ema 0.05
    of fastdiff.sample is then one of 5 % of the training. Costs two more U-Nets in memory, and two
    files' worth of weights on disk with every snapshot, of which there are 32 at most."""
    seed: int = 0
    """Seed of everything random: weights, order of the data, timesteps, noise."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU when there is one."""
    threads: int = 1
    """CPU threads; 0: torch's choice. Images of 8x8 are too small to share: threads that wait
    for each other at every operation are far slower than one as soon as anything else runs."""
    exact: bool = False
    """Compute in float32, contiguous and without torch.compile, on a GPU too. Without it a new run
    on a GPU defaults to --amp bf16 --channels-last, and --compile if it has 5000 steps or more."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Run the U-Net under autocast in bfloat16, or in float16 with a dynamic loss scale."""
    channels_last: bool = False
    """Keep weights and images in channels_last memory format."""
    compile: bool = False
    """Compile the U-Net with torch.compile; on several GPUs block by block, so that gradients are
    averaged while others are still computed."""
    fsdp: bool = False
    """Under torchrun: keep only a part of weights, averages and optimizer state in each process
    (FSDP2), for U-Nets too large for one device."""

    out: str | None = None
    """Run folder; None: runs/<name of the data>."""
    resume: bool = False
    """Continue the run in the run folder from its newest good checkpoint."""
    log_every: int = 25
    """Steps between entries of metrics.jsonl (the only points where the device is waited for)."""
    sample_every: int = 300
    """Steps between sample grids."""
    checkpoint_every: int = 300
    """Steps between checkpoints."""
    keep: int = 2
    """Number of checkpoints kept."""
    num_samples: int = 64
    """Images per sample grid."""
    sample_steps: int = 50
    """DDIM steps per sample grid; the default as far as there are so many timesteps."""
    tensorboard: bool = False
    """Write what metrics.jsonl holds, and the sample grids, for TensorBoard too (needs its
    package); look with: tensorboard --logdir runs."""
    wandb: str | None = None
    """Log to this project of Weights & Biases too (needs its package); WANDB_MODE=offline keeps it
    on this machine."""

    def __post_init__(self) -> None:
        # One decay is as good as a list of one.
        if isinstance(self.ema, (int, float)):
            object.__setattr__(self, "ema", (float(self.ema),))

    @classmethod
    def for_data(cls, data: str) -> TrainConfig:
        """Return the defaults for ``data``: a built-in name, or a folder or file of images."""
        recipe = _RECIPES.get(data, {} if data == "digits" else _OWN_IMAGES)
        return cls(data=data, **recipe)

    @property
    def image_channels(self) -> int | None:
        """What images are converted to: 1 or 3 channels; None: nothing."""
        return COLORS.get(self.channels)

    @property
    def run_folder(self) -> Path:
        """Where the run is written: ``out``, or runs/<name of the data>."""
        if self.out is not None:
            return Path(self.out)
        if self.data in BUILT_IN_DATA:
            return Path("runs") / self.data
        if self.data.startswith("hf:"):
            name = re.sub(r"[^\w.-]+", "-", self.data.removeprefix("hf:"))
            return Path("runs") / _possible(name.strip(".-") or "hf")
        # "." and ".." have no name of their own; links keep theirs, which resolve() would lose.
        data = Path(os.path.abspath(self.data))
        return Path("runs") / _possible(data.stem if data.suffix.lower() == ".npz" else data.name)

    def validate(self) -> None:
        """Raise `UserError` for the first setting no run can have."""
        if not self.data:
            raise UserError(
                f'--data "": give one of {", ".join(BUILT_IN_DATA)}, a folder of images, or an '
                ".npz file"
            )
        check_numbers(self)
        for name in ("data", "data_dir", "out"):
            if "\0" in (getattr(self, name) or ""):
                raise UserError(f"{_flag(name)}: a name cannot hold the character 0")
        _at_least(1, self, "timesteps", "steps", "batch_size", "grad_accum", "log_every")
        _at_least(1, self, "sample_every", "checkpoint_every", "keep", "num_samples")
        _at_least(1, self, "sample_steps", "image_size")
        _at_least(0, self, "threads", "warmup", "weight_decay", "seed")
        for name, most in _MOST.items():
            if (getattr(self, name) or 0) > most:
                raise UserError(f"{_flag(name)} {getattr(self, name)}: give at most {most}")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{_flag(name)} {getattr(self, name)}: give a number above 0")
        for name in ("label_dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{_flag(name)} {getattr(self, name)}: give a number in [0, 1)")
        distinct = len(set(self.ema)) == len(self.ema) > 0
        if not distinct or not all(0 <= decay < 1 for decay in self.ema):
            given = " ".join(map(str, self.ema))
            raise UserError(f"--ema {given}: give different numbers in [0, 1)")
        if self.batch_size % self.grad_accum:
            raise UserError(
                f"--grad-accum {self.grad_accum} does not divide --batch-size {self.batch_size}"
            )
        if self.exact and (self.amp != "off" or self.channels_last or self.compile):
            raise UserError(
                "--exact does not go with --amp, --channels-last or --compile; leave one of them "
                "out, or give --no-exact"
            )
        if self.fsdp and self.compile:
            raise UserError("--fsdp does not go with --compile; leave one of them out")
        # Nobody asked for the default, which grids.draw cuts down.
        if self.sample_steps > self.timesteps and self.sample_steps != TrainConfig.sample_steps:
            raise UserError(
                f"--sample-steps {self.sample_steps} is more than --timesteps {self.timesteps}"
            )

    def to_json(self) -> str:
        """Return the settings as the text of config.json."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "resume"}
        return json.dumps(values, indent=2) + "\n"

    def identity(self) -> dict[str, Any]:
        """Return the settings that a continuation must share, or it would be another run."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in _FREE_ON_RESUME}

    def updated(self, values: dict[str, Any], source: str) -> TrainConfig:
        """Return a copy with ``values`` (field or flag names) put in.

        Raises
        ------
        UserError
            For a key that is no setting, a value of the wrong type, and what is no dict at all,
            naming ``source``.
        """
        if not isinstance(values, dict):
            raise UserError(f"{source}: expected settings by name, got a {type(values).__name__}")
        kinds = typing.get_type_hints(TrainConfig)
        changes = {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in kinds:
                raise UserError(
                    f"{source}: unknown setting {key!r}; valid: {', '.join(sorted(kinds))}"
                )
            changes[name] = _converted(value, kinds[name], f"{source}: {key}")
        return dataclasses.replace(self, **changes)

    def changes_that_break_resuming(self, saved: TrainConfig) -> list[str]:
        """Describe the settings that differ from ``saved`` and would make it another run."""
        before = saved.identity()
        return [
            f"{_flag(name)} {value} (the run has {before[name]})"
            for name, value in self.identity().items()
            if value != before[name]
        ]


# DDPM's recipe for CIFAR-10 (Math §11), and what it becomes for images of unknown kind and size.
# What `fastdiff.training.fit` replaces when it knows the images, and v: an error in eps is
# multiplied by 1/sqrt(abar) where the noise is largest, and DDIM without noise of its own keeps it.
_OWN_IMAGES: dict[str, Any] = {
    "threads": 0,
    "preset": "mnist",
    "prediction": "v",
    "steps": 10_000,
    "batch_size": 128,
    "lr": 5e-4,
    "warmup": 500,
    "ema": 0.999,
    "sample_every": 1000,
    "checkpoint_every": 1000,
}
_RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": {
        **_OWN_IMAGES,
        "preset": "ddpm_cifar10",
        "schedule": "linear",
        "prediction": "eps",
        "flip": True,
        "steps": 800_000,
        "lr": 2e-4,
        "warmup": 5000,
        "lr_schedule": "constant",
        "ema": 0.9999,
        "log_every": 100,
        "sample_every": 5000,
        "checkpoint_every": 5000,
    },
    # For two CPU cores: a step takes 1.1 s of each without AVX-512 (Zen 3), about half with it, the
    # run 20 or 10 minutes. v, because the errors of a network that predicts eps are amplified where
    # the noise is largest, and DDIM without noise of its own keeps them: one sample in five had
    # speckles. --preset mnist --steps 10000 is for a GPU. Never mirrored: all shoes point left.
    "fashion-mnist": {
        "threads": 0,
        "channels_last": True,
        "preset": "mnist_small",
        "prediction": "v",
        "steps": 1000,
        "ema": 0.995,
    },
}

# What may differ between a run and its continuation: how long, where, how fast, how often it
# reports, and what helps a run that diverges. Anything else would make it another run.
_FREE_ON_RESUME = frozenset(
    {
        "amp",
        "channels_last",
        "checkpoint_every",
        "compile",
        "data",  # its content decides, which a checkpoint describes
        "data_dir",
        "device",
        "download",
        "exact",
        "fsdp",
        "grad_accum",
        "grad_clip",
        "keep",
        "log_every",
        "lr",
        "num_samples",
        "out",
        "resume",
        "sample_every",
        "sample_steps",
        "steps",
        "tensorboard",
        "threads",
        "wandb",
    }
)


def check_numbers(config: Any) -> None:
    """Raise `UserError` for numbers of a command that no machine counts to, or that are none."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) >= 2**63:
                raise UserError(f"{_flag(field.name)}: give a number below 2**63")
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{_flag(field.name)} {number}: give a finite number")
    if config.seed < 0:
        raise UserError(f"--seed {config.seed}: give a number of at least 0")


def _possible(name: str) -> str:
    """The name itself, if a file can have it: most disks take 255 bytes, a character up to four."""
    return name if len(os.fsencode(name)) <= 255 else name[:60]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least(least: int, config: TrainConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise UserError(f"{_flag(name)} {value}: give a number of at least {least}")


def _converted(value: Any, kind: Any, what: str) -> Any:
    """Convert a value from a file to a field's type; YAML reads 1e-3, for one, as a string."""
    if typing.get_origin(kind) is types.UnionType:
        if value is None:
            return None
        (kind,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_converted(item, typing.get_args(kind)[0], what) for item in items)
    if typing.get_origin(kind) is Literal:
        options = typing.get_args(kind)
        # YAML 1.1 reads a bare `off` as false.
        value = "off" if value is False and "off" in options else value
        if value not in options:
            raise UserError(
                f"{what}: expected one of {', '.join(options)}, got {reprlib.repr(value)}"
            )
        return value
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is str and isinstance(value, str):
        return value
    elif kind in (int, float) and isinstance(value, (int, float, str)):
        try:
            number = kind(value)
        except (ValueError, OverflowError):
            number = None
        if number is not None and (isinstance(value, str) or number == value):
            return number
    # Shortened: aliases make a few lines of YAML a value whose full text fills the memory.
    raise UserError(f"{what}: expected {kind.__name__}, got {reprlib.repr(value)}")
