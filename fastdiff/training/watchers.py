"""Whoever else is told what metrics.jsonl is told: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastdiff.training.config import TrainConfig
from fastdiff.training.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


class Watcher(Protocol):
    """Is told of a run as it goes on."""

    def write(self, entry: dict[str, Any]) -> None:
        """A line of metrics.jsonl: numbers by name, None where there is none, and lists."""

    def picture(self, grid: Image.Image, step: int) -> None:
        """The sample grid of a step."""

    def close(self) -> None:
        """Nothing more will come."""


def check(config: TrainConfig) -> None:
    """Raise `UserError` if a package is missing that the settings ask for."""
    if config.tensorboard:
        _imported("torch.utils.tensorboard", "--tensorboard", "tensorboard")
    if config.wandb is not None:
        _imported("wandb", f"--wandb {config.wandb}", "wandb")


def watchers(config: TrainConfig, folder: Path, last_step: int) -> list[Watcher]:
    """Those that the settings ask for.

    Parameters
    ----------
    folder : Path
        The run folder; they write into tensorboard/ and wandb/ there.
    last_step : int
        The step that the run goes on from: what came after it counts no longer.
    """
    found: list[Watcher] = []
    if config.tensorboard:
        found.append(TensorBoard(folder / "tensorboard", last_step))
    if config.wandb is not None:
        found.append(WeightsAndBiases(config, folder))
    return found


class TensorBoard:
    """Scalars and pictures as TensorBoard's event files."""

    def __init__(self, folder: Path, last_step: int) -> None:
        module = _imported("torch.utils.tensorboard", "--tensorboard", "tensorboard")
        # A run that goes on hides what a lost one wrote after the checkpoint.
        self._writer = module.SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        for name, value in _scalars(entry).items():
            self._writer.add_scalar(name, value, entry["step"])
        self._writer.flush()

    def picture(self, grid: Image.Image, step: int) -> None:
        pixels = np.asarray(grid)
        layout = "HW" if pixels.ndim == 2 else "HWC"
        self._writer.add_image("samples", pixels, step, dataformats=layout)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, continued when training is. It ignores steps it has seen."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._wandb = _imported("wandb", f"--wandb {config.wandb}", "wandb")
        self._run = self._wandb.init(
            project=config.wandb,
            name=folder.name,
            # The same for the same folder, so that --resume goes on with the same run there.
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=config.identity(),
        )

    def write(self, entry: dict[str, Any]) -> None:
        self._run.log(_scalars(entry), step=entry["step"])

    def picture(self, grid: Image.Image, step: int) -> None:
        self._run.log({"samples": self._wandb.Image(grid)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Names and numbers; entry k of a list (the losses of tenths of the timesteps) as name/k."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, list):
            found |= {f"{name}/{k}": v for k, v in enumerate(value) if v is not None}
        elif value is not None and name != "step":
            found[name] = value
    return found


def _imported(module: str, flag: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{flag} needs the package {package}; install it with: pip install {package}"
        ) from error
