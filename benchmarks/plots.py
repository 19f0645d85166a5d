"""The pictures of a report: speed-ups, bandwidth against a copy, growth of cost."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks import report
from benchmarks.suite import COPIES, OURS

OTHERS = {"eager": "eager PyTorch", "compile": "torch.compile", "diffusers": "diffusers"}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def speed_ups(document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Geometric mean per op and mode, with the whole range as a line."""
    rows = document["ops"]
    kinds = list(dict.fromkeys((row["op"], row["mode"]) for row in rows))
    figure, axes = _figure(8, 1.2 + 0.42 * len(kinds))
    height = 0.8 / len(OTHERS)
    for index, (other, label) in enumerate(OTHERS.items()):
        bars = []
        for place, kind in enumerate(kinds):
            gains = [
                gain
                for row in rows
                if (row["op"], row["mode"]) == kind
                and (gain := report.speed_up(row, other)) is not None
            ]
            if gains:
                mean = report.geometric_mean(gains)
                bars.append((place + index * height, mean, min(gains), max(gains)))
        if bars:
            y, means, low, high = zip(*bars, strict=True)
            axes.barh(y, [mean - 1 for mean in means], height, left=1, label=label)
            axes.hlines(y, low, high, color="black", linewidth=1)
    axes.set_yticks([place + height for place in range(len(kinds))], [" ".join(k) for k in kinds])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times faster than (bar: geometric mean; line: all shapes)")
    axes.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside upper center", ncols=len(OTHERS))
    figure.savefig(path, dpi=90)


def roofline(document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Counted bytes per second over the size of the tensor, and the copies of that size."""
    figure, axes = _figure(8, 5)
    rows = [row for row in document["ops"] if report.tensor_bytes(row)]
    copies: dict[int, float] = {}
    for row in rows:
        size = report.tensor_bytes(row)
        found = (report.bandwidth(row, name) or 0 for name in COPIES)
        copies[size] = max(copies.get(size, 0), *found)
    for op in dict.fromkeys(row["op"] for row in rows):
        points = [
            (report.tensor_bytes(row) / 2**20, moved / 1e9)
            for row in rows
            if row["op"] == op and (moved := report.bandwidth(row, OURS)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), ".", label=op)
    if copies:
        sizes = sorted(copies)
        line = [size / 2**20 for size in sizes], [copies[size] / 1e9 for size in sizes]
        axes.plot(*line, color="black", linewidth=1, label="copy of the same size")
    axes.axhline(
        document["machine"]["copy_gb_s"], color="black", linestyle="--", label="copy, out of cache"
    )
    axes.set(xscale="log", yscale="log", xlabel="MiB of the tensor", ylabel="counted GB/s")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def growth(document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Seconds over batch, resolution and steps, with the slopes of the lines in log-log."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    found = document["growth"]
    figure = Figure(figsize=(4 * len(found), 4), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for name, seconds in curve["seconds"].items():
            label = f"{name}, slope {curve['slopes'][name]:.2f}"
            axes.plot(curve["values"], seconds, "o-", label=label)
        axes.set(xscale="log", yscale="log", xlabel=curve["axis"], ylabel="seconds")
        axes.set_title(f"{curve['op']}, {curve['network']}", fontsize="medium")
        axes.set_xticks(curve["values"], [str(v) for v in curve["values"]], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def write(document: Mapping[str, Any], folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """The pictures that the document has numbers for."""
    drawn = {"speed_ups": (speed_ups, "ops"), "roofline": (roofline, "ops")}
    drawn["growth"] = (growth, "growth")
    paths = []
    for name, (draw, section) in drawn.items():
        if document.get(section):
            paths.append(folder / f"{stem}-{name}.png")
            draw(document, paths[-1])
    return paths
