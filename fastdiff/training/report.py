"""report.html of a run: curves, samples over time, throughput, memory, settings; in one file."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiff.training.files import read_file, write_atomic
from fastdiff.training.logging import read_metrics

if TYPE_CHECKING:
    from fastdiff.training.run import RunFolder

# Grids shown, spread evenly over the run; more would make the page large, not clearer.
_MAX_GRIDS = 9
_GRID = re.compile(r"step-[0-9]+\.png")

# Title, unit of the vertical axis, logarithmic.
_CURVES = {
    "loss": ("Training loss", "mean per log interval", True),
    "grad_norm": ("Norm of the gradient", "before clipping", True),
    "lr": ("Learning rate", "", False),
    "images_per_second": ("Throughput", "images/s", False),
    "memory_mib": ("Memory", "MiB, highest so far", False),
    "loss_scale": ("Loss scale of float16", "", True),
}

# Titles of what `fastdiff.evaluate` writes: NAME.json and its pictures.
_EVALUATIONS = {
    "bpd": "Bits/dim: variational bound",
    "likelihood": "Bits/dim: probability flow",
    "frechet": "Frechet distance",
    "reconstruction": "Reconstruction error of DDIM",
}
_PICTURES = {
    "bpd": ("rate_distortion", "Progressive coding"),
    "frechet": ("frechet", "Samples that were measured"),
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
h3 { margin: 1.5rem 0 .3rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; padding: 0 }
.facts div { color: #666 } .facts b { display: block; color: #222; font-size: 1.3rem }
.facts b { font-weight: 600; font-variant-numeric: tabular-nums }
figure { margin: 0 } figcaption { color: #666; text-align: center }
img { max-width: 100%; height: auto } .grids img { image-rendering: pixelated; width: 100% }
.side { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start }
.side figure { max-width: min(640px, 100%) }
table { border-collapse: collapse } td { padding: .1rem 1rem .1rem 0; vertical-align: top }
td { overflow-wrap: anywhere } td:first-child { color: #666; white-space: nowrap }
.settings { columns: 2 26rem } .settings table { width: 100% } .settings tr { break-inside: avoid }
"""


def write(folder: RunFolder, warn: Callable[[str], None] = warnings.warn) -> Path:
    """Write report.html into a run folder, from the files that are in it, and return its path.

    The page is self-contained: pictures are in it, nothing is loaded from elsewhere.
    """
    entries = read_metrics(folder.path / "metrics.jsonl", warn)
    settings = json.loads(read_file(folder.config))
    settings.pop("checksum", None)
    evaluation = _evaluated(folder.path / "evaluation")
    title = html.escape(folder.path.resolve().name)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{title}: fastdiff run</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style>",
        f"<h1>{title}</h1>",
        _summary(entries, settings, evaluation),
        _evaluation(evaluation, folder.path / "evaluation"),
        "<h2>Samples</h2>",
        _grids(folder.samples),
        "<h2>Curves</h2>",
        _curves(entries),
        "<h2>Settings</h2>",
        '<div class="settings">',
        _table({name: value for name, value in settings.items() if value is not None}),
        "</div>",
        "</html>",
    ]
    path = folder.path / "report.html"
    # Names that are not UTF-8 show their bytes as escapes.
    write_atomic(path, "\n".join(parts).encode("utf-8", "backslashreplace"))
    return path


def _summary(
    entries: list[dict[str, Any]], settings: dict[str, Any], evaluation: dict[str, dict[str, Any]]
) -> str:
    if not entries:
        return "<p>No step has been logged yet.</p>"
    last = entries[-1]
    rate = float(np.median([entry["images_per_second"] for entry in entries]))
    facts = {
        f"step of {settings['steps']:,}": f"{last['step']:,}",
        "loss": f"{last['loss']:.4f}",
        "images/s (median)": f"{rate:,.0f}",
        "MiB of memory": f"{max(entry['memory_mib'] for entry in entries):,}",
    }
    for name, label in (("bpd", "bits/dim (bound)"), ("likelihood", "bits/dim (flow)")):
        if "bits_per_dim" in evaluation.get(name, {}):
            facts[label] = _shown(evaluation[name]["bits_per_dim"])
    found = evaluation.get("frechet", {})
    if "frechet_distance" in found:
        floor = _shown(found.get("real_vs_real"))
        facts[f"Frechet distance (floor {floor})"] = _shown(found["frechet_distance"])
    cells = (f"<div><b>{html.escape(v)}</b>{html.escape(k)}</div>" for k, v in facts.items())
    return f'<div class="facts">{"".join(cells)}</div>'


def _grids(folder: Path) -> str:
    # Those of training, by step; a user's own samples have other names.
    paths = sorted(path for path in folder.glob("step-*.png") if _GRID.fullmatch(path.name))
    if not paths:
        return "<p>None yet.</p>"
    shown = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _MAX_GRIDS)).round())
    figures = [
        _figure(read_file(paths[int(i)]), f"step {int(paths[int(i)].stem[5:]):,}") for i in shown
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
    elif all(value >= 0 for _, value in points):
        axes.set_ylim(bottom=0)
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


def _evaluated(folder: Path) -> dict[str, dict[str, Any]]:
    """What `fastdiff.evaluate` found, by metric, in the order of the page."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(read_file(path))
        except (OSError, ValueError, RecursionError):
            continue  # cut off, or not ours
        if isinstance(values, dict):
            found[path.stem] = values
    order = list(_EVALUATIONS)
    return dict(sorted(found.items(), key=lambda item: (*order, item[0]).index(item[0])))


def _evaluation(evaluation: dict[str, dict[str, Any]], folder: Path) -> str:
    """The numbers of each metric, without its curves, beside its picture."""
    sections = []
    for name, values in evaluation.items():
        single = {k: v for k, v in values.items() if not isinstance(v, (list, dict))}
        single.pop("metric", None)
        verdict = html.escape(str(single.pop("verdict", "")))
        picture = ""
        file, caption = _PICTURES.get(name, (None, ""))
        if file is not None and (folder / f"{file}.png").is_file():
            picture = _figure(read_file(folder / f"{file}.png"), caption)
        title = html.escape(_EVALUATIONS.get(name, name))
        head = f"<h3>{title}</h3><p><b>{verdict}</b></p>"
        sections.append(f'{head}<div class="side">{_table(single)}{picture}</div>')
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
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(_shown(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _shown(value: Any) -> str:
    """A value for people: numbers to four digits, yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
