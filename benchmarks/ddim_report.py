"""What `ddim_tables` measured beside what DDIM published: text, plot, and where trends agree."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

from benchmarks import report

ETAS = ("0", "0.2", "0.5", "1", "sigma_hat")

# DDIM Table 1, CIFAR-10 FID by eta and S, and Table 2 (docs/mathematics.md §12).
PUBLISHED_STEPS = (10, 20, 50, 100, 1000)
PUBLISHED_FID = {
    "0": (13.36, 6.84, 4.67, 4.16, 4.04),
    "0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
    "0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
    "1": (41.07, 18.36, 8.01, 5.78, 4.73),
    "sigma_hat": (367.43, 133.37, 32.72, 9.99, 3.17),
}
PUBLISHED_RECONSTRUCTION = {
    10: 0.014,
    20: 0.0065,
    50: 0.0023,
    100: 0.0009,
    200: 0.0004,
    500: 0.0001,
    1000: 0.0001,
}


def verdicts(results: dict[str, Any]) -> list[tuple[bool, str]]:
    """(whether it holds here, a trend of DDIM's tables)."""
    quality, errors = results["quality"], results["reconstruction"]
    steps = list(quality["0"])
    found = []
    for S in [S for S in steps[:2] if all(quality[eta][S] is not None for eta in ETAS)]:
        column = {eta: quality[eta][S] for eta in ETAS}
        found.append((min(column, key=column.get) == "0", f"eta = 0 is the best at S = {S}"))
        worst = max(column, key=column.get)
        found.append((worst == "sigma_hat", f"sigma_hat is the worst at S = {S}"))
    small = [quality[eta][steps[0]] for eta in ETAS]
    rises = all(a < b for a, b in itertools.pairwise(small))
    found.append((rises, f"at S = {steps[0]} the distance rises with eta"))
    for eta in ("0", "sigma_hat"):
        row = [value for value in quality[eta].values() if value is not None]
        falls = all(b < a for a, b in itertools.pairwise(row))
        found.append((falls, f"{_label(eta)}: the distance falls with S"))
    full = [quality[eta].get(1000) for eta in ("sigma_hat", "0")]
    if None not in full:
        found.append((full[0] < full[1], "at S = 1000 sigma_hat is better than eta = 0"))
    falls = all(b < a for a, b in itertools.pairwise(errors.values()))
    found.append((falls, "the reconstruction error falls with S"))
    return found


def write_report(out: pathlib.Path, results: dict[str, Any]) -> None:
    """tables.json, tables.md and tables.png."""
    (out / "tables.json").write_text(report.to_json(results, indent=1))
    (out / "tables.md").write_text(_markdown(results))
    _plot(results).savefig(out / "tables.png", dpi=110)


def _label(eta: str) -> str:
    return "sigma_hat" if eta == "sigma_hat" else f"eta = {eta}"


def _markdown(results: dict[str, Any]) -> str:
    plan, quality = results["plan"], results["quality"]
    steps = list(quality["0"])
    lines = [
        f"# DDIM's tables on {results['data']}",
        "",
        f"U-Net trained for {plan['train_steps']} steps of 64 images, linear schedule, T = 1000. "
        f"Table 1: {plan['num']} samples per cell, features of a classifier with "
        f"{results['classifier_accuracy']:.1%} training accuracy; as many real images are at "
        f"{results['real']:.4f} from all of them. In brackets: published FIDs on CIFAR-10, another "
        "network, other images, other features: only trends can be compared.",
        "",
        "## Table 1: Frechet distance by S",
        "",
        "| | " + " | ".join(f"S = {S}" for S in steps) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for eta in ETAS:
        cells = []
        for S in steps:
            value = quality[eta][S]
            published = PUBLISHED_FID[eta][PUBLISHED_STEPS.index(S)]
            cells.append(f"{'-' if value is None else f'{value:.4f}'} ({published})")
        lines.append(f"| {_label(eta)} | " + " | ".join(cells) + " |")
    errors = results["reconstruction"]
    lines += [
        "",
        "## Table 2: reconstruction error per dimension by S",
        "",
        "| | " + " | ".join(f"S = {S}" for S in errors) + " |",
        "|---" * (len(errors) + 1) + "|",
        "| here | " + " | ".join(f"{error:.2g}" for error in errors.values()) + " |",
        "| CIFAR-10 | " + " | ".join(str(PUBLISHED_RECONSTRUCTION[S]) for S in errors) + " |",
        "",
        "## Trends",
        "",
        *(f"- {'agrees' if ok else '**differs**'}: {text}" for ok, text in verdicts(results)),
        "",
    ]
    return "\n".join(lines)


def _plot(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    here, published, table_2 = figure.subplots(1, 3)
    for eta in ETAS:
        row = {S: v for S, v in results["quality"][eta].items() if v is not None}
        here.plot(list(row), list(row.values()), "o-", label=_label(eta))
        published.plot(PUBLISHED_STEPS, PUBLISHED_FID[eta], "o-", label=_label(eta))
    here.axhline(results["real"], color="grey", linestyle=":", label="real images")
    here.set(title=f"Frechet distance, {results['data']}")
    published.set(title="FID, CIFAR-10 (published)")
    errors = results["reconstruction"]
    table_2.plot(list(errors), list(errors.values()), "o-", label=results["data"])
    table_2.plot(
        list(PUBLISHED_RECONSTRUCTION),
        list(PUBLISHED_RECONSTRUCTION.values()),
        "o-",
        label="CIFAR-10 (published)",
    )
    table_2.set(title="reconstruction error per dimension")
    for axes in (here, published, table_2):
        axes.set(xlabel="S", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure
