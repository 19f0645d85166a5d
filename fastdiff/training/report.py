"""report.html of a run: curves, samples over time, throughput, memory, settings; in one file."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.training.checkpoint import write_atomic
from fastdiff.training.logging import read_metrics

if TYPE_CHECKING:
    from fastdiff.training.run import RunFolder

# Grids shown, spread evenly over the run; more would make the page large, not clearer.
_MAX_GRIDS = 8

# Title, unit of the vertical axis, logarithmic.
_CURVES = {
    "loss": ("Training loss", "mean per log interval", True),
    "grad_norm": ("Norm of the gradient", "before clipping", True),
    "lr": ("Learning rate", "", False),
    "images_per_second": ("Throughput", "images/s", False),
    "memory_mib": ("Memory", "MiB, highest so far", False),
    "loss_scale": ("Loss scale of float16", "", True),
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { color: #666; text-align: center }
img { max-width: 100%; height: auto } .grids img { image-rendering: pixelated; width: 100% }
table { border-collapse: collapse } td { padding: .15rem 1rem .15rem 0; vertical-align: top }
td:first-child { color: #666 }
"""


def write(folder: RunFolder) -> Path:
    """Write report.html into a run folder, from the files that are in it, and return its path.

    The page is self-contained: pictures are in it, nothing is loaded from elsewhere.
    """
    entries = read_metrics(folder.path / "metrics.jsonl")
    settings = json.loads(folder.config.read_text())
    title = html.escape(folder.path.resolve().name)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{title}: fastdiff run</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style>",
        f"<h1>{title}</h1>",
        _summary(entries, settings),
        "<h2>Samples</h2>",
        _grids(folder.samples),
        "<h2>Curves</h2>",
        _curves(entries),
        _evaluation(folder.path / "evaluation"),
        "<h2>Settings</h2>",
        _table({name: value for name, value in settings.items() if value is not None}),
        "</html>",
    ]
    path = folder.path / "report.html"
    write_atomic(path, "\n".join(parts).encode())
    return path


def _summary(entries: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    if not entries:
        return "<p>No step has been logged yet.</p>"
    last = entries[-1]
    rate = float(np.median([entry["images_per_second"] for entry in entries]))
    return (
        f"<p>Step {last['step']:,} of {settings['steps']:,} &middot; loss {last['loss']:.4f} "
        f"&middot; {rate:,.0f} images/s (median)</p>"
    )


def _grids(folder: Path) -> str:
    # Those of training, by step; a user's own samples have other names.
    paths = sorted(folder.glob("step-*.png"))
    if not paths:
        return "<p>None yet.</p>"
    shown = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _MAX_GRIDS)).round())
    figures = [
        _figure(paths[int(i)].read_bytes(), f"step {int(paths[int(i)].stem[5:]):,}") for i in shown
    ]
    return f'<div class="cards grids">{"".join(figures)}</div>'


def _curves(entries: list[dict[str, Any]]) -> str:
    figures = [
        _figure(_curve(entries, name, unit, log), title)
        for name, (title, unit, log) in _CURVES.items()
        if any(entry.get(name) is not None for entry in entries)
    ]
    if any("loss_by_timestep" in entry for entry in entries):
        figures.insert(1, _figure(_by_timestep(entries), "Loss by timestep"))
    return f'<div class="cards">{"".join(figures)}</div>' if figures else "<p>None yet.</p>"


def _curve(entries: list[dict[str, Any]], name: str, unit: str, log: bool) -> bytes:
    points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
    figure, axes = _axes()
    axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 3 else None)
    axes.set(xlabel="step", ylabel=unit)
    if log and all(value > 0 for _, value in points):
        axes.set_yscale("log")
    return _png(figure)


def _by_timestep(entries: list[dict[str, Any]]) -> bytes:
    """Mean loss of each tenth of the timesteps, in the first and the last quarter of the run."""
    rows = [entry["loss_by_timestep"] for entry in entries if "loss_by_timestep" in entry]
    values = np.array(rows, dtype=float)  # None, where none was drawn, becomes nan
    quarter = max(1, len(values) // 4)
    figure, axes = _axes()
    for label, part in (("first quarter", values[:quarter]), ("last quarter", values[-quarter:])):
        known = np.isfinite(part)
        total = np.where(known, part, 0).sum(0)
        mean = np.divide(total, known.sum(0), out=np.full(len(total), np.nan), where=known.any(0))
        axes.plot((np.arange(len(mean)) + 0.5) / len(mean), mean, marker=".", label=label)
    axes.set(xlabel="t / T", ylabel="loss", yscale="log")
    axes.legend()
    return _png(figure)


def _evaluation(folder: Path) -> str:
    """What `fastdiff.evaluate` found: the numbers of each metric, without its curves."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text())
        single = {name: v for name, v in values.items() if not isinstance(v, (list, dict))}
        sections.append(f"<h3>{html.escape(path.stem)}</h3>{_table(single)}")
    return "<h2>Evaluation</h2>" + "".join(sections) if sections else ""


def _axes():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(values: dict[str, Any]) -> str:
    rows = (
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"
