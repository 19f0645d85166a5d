"""A run folder, and building a run's model and process from settings or from a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdiff._backends import select_backend
from fastdiff.training import lock
from fastdiff.training.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    checksum,
    load_newest,
    prune,
)
from fastdiff.training.config import COLORS, TrainConfig
from fastdiff.training.distributed import World
from fastdiff.training.errors import UserError, naming
from fastdiff.training.files import (
    TEMPORARY,
    read_file,
    remove_leftovers,
    write_atomic,
    write_new,
)

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion
    from fastdiff.nn import UNet

# With or without an index. Others, such as meta, cannot train or sample.
_DEVICES = ("cpu", "cuda", "mps", "xpu")

_LARGEST_CONFIG = 1 << 24


@dataclass(frozen=True)
class RunFolder:
    """Names of what a run writes; `create` makes the folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.json"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Grids of samples, one picture each."""
        return self.path / "samples"

    @property
    def model(self) -> Path:
        """The averaged model in diffusers' format."""
        return self.path / "model"

    @property
    def averages(self) -> Path:
        """Snapshots of --posthoc-ema."""
        return self.path / "averages"

    def grid(self, step: int) -> Path:
        """The grid that training draws at a step."""
        return self.samples / f"step-{step:08d}.png"

    @contextmanager
    def locked(self, warn: Callable[[str], None]) -> Iterator[None]:
        """Make the folder if it is not there, and keep other processes from training in it.

        Raises
        ------
        UserError
            One does already, or nothing can be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot write there: {error.strerror}") from error
        with lock.locked(self.path, warn):
            yield

    def tidy(self, step: int | None, keep: int) -> None:
        """Remove what a killed process left: temporary files, and checkpoints beyond `keep`.

        Parameters
        ----------
        step : int, optional
            That of the checkpoint which the run goes on from.
        """
        written = self.samples, self.path / "evaluation", self.averages, self.checkpoints
        for folder in (self.path, *written):
            remove_leftovers(folder)
        if step is not None:
            prune(self.checkpoints, step, keep)

    def check_new(self) -> None:
        """Raise `UserError` if something is there already or the folder cannot be made.

        Empty folders and temporary files do not count: a start that was killed leaves them.
        """
        if self.path.is_dir():
            found = (path for path in self.path.rglob("*") if not path.is_dir())
            if not all(path.name.startswith((TEMPORARY, lock.NAME)) for path in found):
                raise UserError(
                    f"--out {self.path} exists and is not empty; continue that run with --resume, "
                    "or give another folder with --out"
                )
        elif self.path.exists():
            raise UserError(f"--out {self.path} is a file; give a folder")
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"--out {self.path}: cannot write in {parent}; give another folder")

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write config.json.

        A new run claims the folder by config.json, which one process alone succeeds in; before
        that there is nothing to resume, and a run can be started anew.
        """
        write = write_atomic if config.resume else write_new
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            try:
                values = json.loads(config.to_json())
                values["checksum"] = _checksum(values)
                write(self.config, (json.dumps(values, indent=2) + "\n").encode())
            except FileExistsError as error:
                raise UserError(
                    f"--out {self.path}: another process has started a run there; give another "
                    "folder with --out"
                ) from error
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot write there: {error.strerror}") from error

    def saved_config(self, argument: str) -> TrainConfig:
        """Read config.json.

        Raises
        ------
        UserError
            This is no run folder, or something in it is a link that leads out of it: nothing may
            be read or overwritten elsewhere because of what a folder from others contains.
        """
        self._refuse_links(argument)
        try:
            values = json.loads(read_file(self.config, _LARGEST_CONFIG))
        except OSError as error:
            raise UserError(
                f"{argument}: {self.path} holds no run ({self.config.name}: {error.strerror})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{argument}: {self.config} is not valid JSON: {error}") from error
        if isinstance(values, dict) and "checksum" in values:
            if values["checksum"] != _checksum(values):
                raise UserError(
                    f"{argument}: {self.config} does not match its checksum: it is damaged, or was "
                    "changed by hand; in that case take its line `checksum` out"
                )
            del values["checksum"]
        return TrainConfig().updated(values, f"{argument}: {self.config}")

    def _refuse_links(self, argument: str) -> None:
        root = os.path.realpath(self.path)  # which may itself be a link
        for parent, folders, files in os.walk(root):
            if parent == os.path.join(root, "wandb"):
                folders.clear()  # links from there to its cache, and we never read what is there
                continue
            for name in folders + files:
                path = os.path.join(parent, name)
                if os.path.islink(path):
                    target = os.path.realpath(path)
                    if not target.startswith(root + os.sep):
                        raise UserError(
                            f"{argument}: {path} is a link that leads out of the run folder, to "
                            f"{target}; put the file itself there"
                        )


def _checksum(values: dict[str, Any]) -> str:
    """That of config.json. Where the run is, the folder knows better, which may have been moved."""
    return checksum({name: value for name, value in values.items() if name != "out"})


def build_unet(config: TrainConfig, image_shape: tuple[int, int, int], num_classes: int) -> UNet:
    """Build the U-Net that ``config`` asks for, for images (H, W, C).

    A preset used at another size keeps its attention at the same levels. Other channels than the
    preset's are an error under ``--channels preset``.
    """
    from fastdiff.nn import UNet, preset_config

    height, width, channels = image_shape
    with naming("--preset"):
        preset = preset_config(config.preset)
    if config.channels == "preset" and channels != preset.in_channels:
        raise UserError(_wrong_channels(config, preset.in_channels, channels))
    for length in (height, width):
        if length % preset.size_divisor:
            raise UserError(
                f"--preset {config.preset} needs images whose height and width are multiples of "
                f"{preset.size_divisor}, got {height}x{width}; resize them (--image-size for a "
                "folder) or choose a preset with fewer levels"
            )
    overrides = {
        "sample_size": height,
        "in_channels": channels,
        "self_conditioning": config.self_conditioning,
        "learned_variance": config.variance in ("learned", "learned_range"),
        "attention_resolutions": [
            height >> preset.resolutions.index(r) for r in preset.attention_resolutions
        ],
    }
    if config.class_cond:
        if num_classes < 2:
            raise UserError(
                f"--class-cond needs images with classes, and --data {config.data} has none; a "
                "folder has one subfolder per class, an .npz file an array of labels"
            )
        overrides |= {"num_classes": num_classes, "null_class": config.label_dropout > 0}
    with naming("--preset"):
        return UNet.from_preset(config.preset, **overrides)


def _wrong_channels(config: TrainConfig, expected: int, given: int) -> str:
    from fastdiff.nn import PRESETS

    remedies = [f"--channels {c} converts the images" for c, n in COLORS.items() if n == expected]
    remedies += ["--channels data changes the preset"]
    fitting = [name for name, preset in PRESETS.items() if preset.in_channels == given]
    remedies += [f"presets for {given}: {', '.join(fitting)}"] if fitting else []
    return (
        f"--preset {config.preset} is made for {expected} channels per image, --data {config.data} "
        f"has {given}; {'; '.join(remedies)}"
    )


def build_diffusion(config: TrainConfig) -> GaussianDiffusion:
    """Build the diffusion process that ``config`` asks for, checked to be trainable."""
    from fastdiff.diffusion import losses
    from fastdiff.diffusion.gaussian import GaussianDiffusion
    from fastdiff.diffusion.schedules import NoiseSchedule
    from fastdiff.diffusion.step_tables import VARIANCES
    from fastdiff.diffusion.timestep_samplers import TIMESTEP_SAMPLERS
    from fastdiff.diffusion.weightings import WEIGHTINGS
    from fastdiff.reference.step_columns import PREDICTIONS

    for flag, value, known in (
        ("--prediction", config.prediction, PREDICTIONS),
        ("--variance", config.variance, VARIANCES),
        ("--loss", config.loss, losses.LOSSES),
        ("--weighting", config.weighting, (None, *WEIGHTINGS)),
        ("--timestep-sampler", config.timestep_sampler, TIMESTEP_SAMPLERS),
    ):
        if value not in known:
            raise UserError(f"{flag} {value}: give one of {', '.join(map(str, known))}")
    with naming("--schedule"):
        schedule = NoiseSchedule.from_name(config.schedule, config.timesteps)
    if config.prediction == "eps" and schedule.has_zero_terminal_snr:
        raise UserError(
            f"--prediction eps does not work with --schedule {config.schedule}, which leaves "
            "nothing of the image at the last timestep; choose --prediction v or x0, or another "
            "--schedule"
        )
    with naming("--loss, --variance or --weighting"):
        diffusion = GaussianDiffusion(
            schedule,
            config.prediction,
            config.variance,
            config.loss,
            config.weighting,
            config.self_conditioning,
        )
    if diffusion.learns_variance and config.loss not in losses.TRAIN_VARIANCE:
        raise UserError(
            f"--loss {config.loss} does not train the variances of --variance {config.variance}; "
            f"choose --loss {' or '.join(sorted(losses.TRAIN_VARIANCE))}, or --variance "
            "fixed_large or fixed_small"
        )
    return diffusion


def choose_device(name: str, world: World = World()) -> torch.device:  # noqa: B008 (frozen)
    """Turn ``--device`` into a device that exists; "auto" is a GPU when there is one.

    Of several processes on a machine each gets a GPU of its own.

    Raises
    ------
    UserError
        There is no such device, or the backend in FASTDIFF_BACKEND cannot run there.
    """
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    elif name.split(":")[0] not in _DEVICES:
        raise UserError(f"--device {name}: give auto or one of {', '.join(_DEVICES)}")
    else:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            # torch's messages run over many lines; the first says what is wrong.
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--device {name}: {reason}; `--device auto` takes what is there"
            ) from error
    if world.size > 1 and device.type != "cpu":
        device = _own_gpu(name, device, world)
    try:
        select_backend(f"--device {device}", torch.empty(0, device=device), unsupported=None)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    return device


def _own_gpu(name: str, device: torch.device, world: World) -> torch.device:
    if device.type != "cuda":
        raise UserError(f"--device {name}: several processes work on cpu or cuda only")
    if device.index is not None:
        raise UserError(
            f"--device {name}: every process needs a GPU of its own; give --device cuda"
        )
    present = torch.cuda.device_count()
    if world.local_rank >= present:
        raise UserError(
            f"--device {name}: process {world.local_rank} of this machine has no GPU, there are "
            f"{present}; start as many with torchrun --nproc-per-node {present}"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def use_threads(config: TrainConfig) -> None:
    """Give torch the number of CPU threads that the run asks for."""
    if config.threads:
        torch.set_num_threads(config.threads)


def newest_checkpoint(run: RunFolder, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest good checkpoint of a run, None if it has none yet."""
    try:
        return load_newest(run.checkpoints, warn)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; train anew with another --out") from error
