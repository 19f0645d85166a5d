"""What a run shows of its training: metrics.jsonl, loss.png, and what watches it."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdiff.training.files import read_file, write_atomic
from fastdiff.training.watchers import Watcher, watchers

if TYPE_CHECKING:
    from PIL import Image

    from fastdiff.training.config import TrainConfig
    from fastdiff.training.run import RunFolder


def read_metrics(path: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without one that was cut off while it was written.

    Lines that are no log entries are left out, and ``warn`` is told how many.
    """
    if not path.exists():
        return []
    # What follows the last line's end was cut off.
    lines = read_file(path).decode(errors="replace").split("\n")[:-1]
    entries = [entry for entry in map(_entry, lines) if entry is not None]
    if len(entries) < len(lines):
        warn(
            f"{path}: {len(lines) - len(entries)} of {len(lines)} lines are no log entries, or "
            "hold numbers that are not finite; they are left out"
        )
    return entries


def _entry(line: str) -> dict[str, Any] | None:
    """What a line says, if it has the shape of a log entry."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or "loss" not in entry:
        return None
    numbers: list[Any] = [entry["step"], entry["loss"]]
    for value in entry.values():
        numbers += value if isinstance(value, list) else [value]
    return entry if all(value is None or _is_finite(value) for value in numbers) else None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


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
    warn : callable
        Is told of lines that cannot be read.
    known : dict, optional
        `digest` when the checkpoint of ``last_step`` was written: ``warn`` is told if the lines up
        to there are others now.
    """

    def __init__(
        self,
        path: Path,
        last_step: int,
        watchers: Sequence[Watcher] = (),
        warn: Callable[[str], None] = warnings.warn,
        known: dict[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.watchers = watchers
        self.entries = [e for e in read_metrics(path, warn) if e["step"] <= last_step]
        if known is not None and known != self.digest():
            warn(
                f"{path} is damaged or was changed: it has {len(self.entries)} lines up to step "
                f"{last_step}, the checkpoint knows of {known.get('lines')}, not all of them the "
                "same; weights and samples do not depend on it"
            )
        write_atomic(path, "".join(json.dumps(e) + "\n" for e in self.entries).encode())

    @classmethod
    def of_run(
        cls,
        config: TrainConfig,
        folder: RunFolder,
        last_step: int,
        warn: Callable[[str], None],
        known: dict[str, Any] | None,
    ) -> Metrics:
        """Those of a run, with the watchers that its settings ask for."""
        path = folder.path / "metrics.jsonl"
        return cls(path, last_step, watchers(config, folder.path, last_step), warn, known)

    def digest(self) -> dict[str, Any]:
        """Number of lines so far, and a checksum of what they say."""
        text = json.dumps(self.entries, sort_keys=True)
        return {"lines": len(self.entries), "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def write(self, **entry: Any) -> None:
        """Append one line."""
        self.entries.append(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for watcher in self.watchers:
            watcher.write(entry)

    def save_grid(self, grid: Image.Image, path: Path, step: int) -> None:
        """Write the sample grid of a step, and show it to the watchers."""
        picture = io.BytesIO()
        grid.save(picture, "PNG")
        write_atomic(path, picture.getvalue())
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
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format="png")
        write_atomic(path, picture.getvalue())


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
