"""What a run shows of its training: metrics.jsonl, loss.png, and what watches it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdiff.training.checkpoint import write_atomic
from fastdiff.training.watchers import Watcher, watchers

if TYPE_CHECKING:
    from PIL import Image

    from fastdiff.training.config import TrainConfig
    from fastdiff.training.run import RunFolder


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, up to one that was cut off while it was written."""
    entries: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return entries


class Metrics:
    """The lines of metrics.jsonl, on disk and in memory.

    Parameters
    ----------
    path : Path
        The file; appended to.
    last_step : int
        Lines after this step, written by a run that was lost after its last checkpoint, are
        dropped, so that the file reads as if the run had never stopped.
    watchers : sequence of Watcher
        Are told the same, until the context ends.
    """

    def __init__(self, path: Path, last_step: int, watchers: Sequence[Watcher] = ()) -> None:
        self.path = path
        self.watchers = watchers
        self.entries = [e for e in read_metrics(path) if e["step"] <= last_step]
        write_atomic(path, "".join(json.dumps(e) + "\n" for e in self.entries).encode())

    @classmethod
    def of_run(cls, config: TrainConfig, folder: RunFolder, last_step: int) -> Metrics:
        """Those of a run, with the watchers that its settings ask for."""
        path = folder.path / "metrics.jsonl"
        return cls(path, last_step, watchers(config, folder.path, last_step))

    def write(self, **entry: Any) -> None:
        """Append one line."""
        self.entries.append(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for watcher in self.watchers:
            watcher.write(entry)

    def save_grid(self, grid: Image.Image, folder: Path, step: int) -> None:
        """Write the sample grid of a step, and show it to the watchers."""
        grid.save(folder / f"step-{step:08d}.png")
        for watcher in self.watchers:
            watcher.picture(grid, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        for watcher in self.watchers:
            watcher.close()

    def plot(self, path: Path) -> None:
        """Draw loss against step: every entry, and a running mean over a twentieth of them."""
        from matplotlib.figure import Figure

        if not self.entries:
            return
        steps = [entry["step"] for entry in self.entries]
        losses = np.array([entry["loss"] for entry in self.entries])
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        # Figure instead of pyplot: no display, no global state.
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, losses, alpha=0.35, linewidth=1, label="log interval")
        axes.plot(steps[window - 1 :], smooth, linewidth=1.5, label="running mean")
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def memory_mib(device: torch.device) -> int:
    """Most memory held so far: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes there, KiB elsewhere
