"""The counts of `python -m benchmarks.audit.traffic --csv`, and what docs/traffic.md says of them.

    python -m benchmarks.audit.traffic_page FILE.csv...

prints one line per op, pass, backend and architecture: the worst ratio to the bound and the most
sectors over all shapes, dtypes and layouts, and below it every row that is above the target.
"""

from __future__ import annotations

import argparse
import csv
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

TARGET = 1.05
SECTORS = 1.1
LABELS = ("op", "mode", "shape", "dtype", "layout", "backend", "arch")
COLUMNS = (*LABELS, "launches", "blocks", "ran", "MB", "of_bound", "sectors")


def append(path: pathlib.Path, row: Any) -> None:
    """Add one `traffic.Row`, so that a run of hours can be cut off and continued."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(
            [
                *(row.labels[name] for name in LABELS),
                row.launches,
                "+".join(map(str, row.blocks)),
                f"{row.ran:.3g}",
                f"{row.moved / 1e6:.4g}",
                f"{row.of_bound:.4f}",
                f"{row.sectors:.3f}",
            ]
        )


def read(paths: Iterable[pathlib.Path]) -> list[dict[str, str]]:
    """Rows of all files; of one that was counted again the last."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found[tuple(row[name] for name in LABELS)] = row
    return list(found.values())


def place(row: dict[str, str]) -> str:
    return f"{row['shape']} {row['dtype']} {row['layout']}"


def summary(rows: Sequence[dict[str, str]]) -> str:
    """One line per op, pass, backend and architecture."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "mode", "backend", "arch"))
        groups.setdefault(key, []).append(row)
    lines = [
        "| op | pass | backend | arch | rows | > 1.05 | worst of bound | where | most sectors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, group in sorted(groups.items()):
        worst = max(group, key=lambda row: float(row["of_bound"]))
        above = sum(float(row["of_bound"]) > TARGET for row in group)
        sectors = max(float(row["sectors"]) for row in group)
        counts = f"{len(group)} | {above} | {float(worst['of_bound']):.3f} | {place(worst)}"
        lines.append(f"| {' | '.join(key)} | {counts} | {sectors:.2f} |")
    return "\n".join(lines) + "\n"


def above(rows: Sequence[dict[str, str]]) -> str:
    """Every row above a target."""
    titles = (*LABELS, "blocks", "of_bound", "sectors")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        if float(row["of_bound"]) > TARGET or float(row["sectors"]) > SECTORS:
            lines.append("| " + " | ".join(row[title] for title in titles) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit.traffic_page", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("csv", nargs="+", type=pathlib.Path, metavar="FILE")
    rows = read(parser.parse_args(argv).csv)
    print(f"{len(rows)} rows\n\n{summary(rows)}\nAbove a target:\n\n{above(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
