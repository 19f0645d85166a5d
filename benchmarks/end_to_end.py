"""Training steps and sampling of whole networks: `python -m benchmarks --end-to-end`.

Images per second and peak memory of every contender, eager and (with `--compile all`) under
torch.compile, in both memory formats; and how cost grows with batch, resolution and steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_sampling, bench_training_step, report
from benchmarks.networks import (
    BATCHES,
    PUBLISHED,
    Network,
    T,
    networks,
    parameters,
    peak_bytes,
    slope,
)
from benchmarks.shapes import LAYOUTS
from benchmarks.suite import Contender, Record, Workload, run

TASKS = ("training_step", "sampling")
STEPS = 4
DEFAULT, QUICK = PUBLISHED[:2], PUBLISHED[:1]
# Values of each axis. Resolution: DDPM's CIFAR-10 network, narrow, because its cost is quadratic.
GROWTH = {"batch": (8, 16, 32, 64), "resolution": (16, 32, 64), "steps": (2, 4, 8, 16)}
NARROW = {"channels": 32}


@dataclass(frozen=True)
class Task:
    """One network doing one thing."""

    name: str
    preset: str
    batch: int
    layout: str = "nchw"
    compiled: bool = False
    steps: int = STEPS
    size: int | None = None
    narrow: bool = False

    @property
    def labels(self) -> dict[str, str]:
        steps = f" {self.steps} steps" if self.name == "sampling" else ""
        return {
            "shape": f"{self.preset} b{self.batch}{steps}",
            "dtype": "fp32",
            "layout": self.layout,
            "mode": "compile" if self.compiled else "eager",
        }

    def contenders(self, device: torch.device) -> dict[str, tuple[Network, Contender]]:
        overrides: dict[str, Any] = dict(NARROW) if self.narrow else {}
        if self.size:
            overrides["sample_size"] = self.size
        layout = LAYOUTS[self.layout]
        found = networks(self.preset, device, layout, self.compiled, **overrides)
        config = found[0].module.config
        generator = torch.Generator().manual_seed(0)
        shape = self.batch, config.in_channels, config.sample_size, config.sample_size
        x = torch.randn(shape, generator=generator).to(device).to(memory_format=layout)
        t = torch.randint(T, shape[:1], generator=generator).to(device)
        return {network.name: (network, self._contender(network, x, t)) for network in found}

    def _contender(self, network: Network, x: Tensor, t: Tensor) -> Contender:
        if self.name == "sampling":
            return bench_sampling.contender(network, x, self.steps)
        return bench_training_step.contender(network, x.clamp(-1, 1), t)


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    presets = QUICK if options.quick else PUBLISHED if options.all else DEFAULT
    for preset in presets:
        for name in TASKS:
            for layout in ("nchw",) if options.quick else LAYOUTS:
                # A whole network takes minutes to compile.
                for compiled in (False, True) if options.compile == "all" else (False,):
                    yield Task(name, preset, BATCHES[preset], layout, compiled)


def measure(task: Task, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """A row of the report."""
    made = task.contenders(device)
    workload = Workload(task.labels, 0, {name: c for name, (_, c) in made.items()})
    record: Record = run(workload, device, rounds, seconds)
    return {
        "op": task.name,
        **record.to_json(),
        "images": task.batch,
        "parameters": {name: parameters(network.module) for name, (network, _) in made.items()},
        "peak_bytes": {name: peak_bytes(made[name][1].run, device) for name in record.timings},
    }


def grow(axis: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of ours and the peers over the values of one axis."""
    values = GROWTH[axis][:2] if options.quick else GROWTH[axis]
    name = "sampling" if axis == "steps" else "training_step"
    narrow = axis == "resolution"
    preset, batch = ("ddpm_cifar10", 1) if narrow else ("digits", 16)
    seconds: dict[str, list[float]] = {}
    for value in values:
        task = Task(
            name,
            preset,
            value if axis == "batch" else batch,
            steps=value if axis == "steps" else STEPS,
            size=value if narrow else None,
            narrow=narrow,
        )
        row = measure(task, device, 5, 1.5)
        for contender in row["contenders"]:
            seconds.setdefault(contender, []).append(report.seconds(row, contender))
    complete = {who: times for who, times in seconds.items() if len(times) == len(values)}
    return {
        "op": name,
        "network": preset + (f", {NARROW['channels']} channels" if narrow else ""),
        "axis": axis,
        "values": list(values),
        "seconds": complete,
        "slopes": {who: slope(values, times) for who, times in complete.items()},
    }


def collect(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The sections "end_to_end" and "growth" of the report, printed as they come."""
    device = torch.device(options.device)
    print("\ntraining steps and sampling: images per second, and peak MiB")
    titles = ["what", "layout", "mode", "images/s", "MiB"]
    widths = {"what": 34, "layout": 13, "mode": 7, "images/s": 9, "MiB": 6}
    table = report.Table([*titles, "contender"], {**widths, "contender": 27})
    rows = []
    for task in tasks(options):
        row = measure(task, device, options.rounds or (3 if options.quick else 5), 4.0)
        rows.append(row)
        for name in (*row["contenders"], *row["wrong"]):
            seconds, peak = report.seconds(row, name), row["peak_bytes"].get(name)
            rate = report.number(seconds and row["images"] / seconds, missing=report.WRONG)
            memory = report.number(peak and peak / 2**20, 0)
            what = f"{task.name} {row['shape']}"
            table.row([what, row["layout"], row["mode"], rate, memory, name])
    print("\ncost grows with the power")
    curves = []
    for axis in GROWTH:
        curve = grow(axis, options, device)
        curves.append(curve)
        slopes = ", ".join(f"{who} {power:.2f}" for who, power in curve["slopes"].items())
        print(f"  {curve['op']} {curve['network']}, {axis} {curve['values']}: {slopes}")
    return {"end_to_end": rows, "growth": curves}
