"""Tables for the terminal and JSON for machines."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.suite import Record

WRONG = "wrong"


def print_facts(facts: Mapping[str, Any]) -> None:
    print("  ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))


def number(value: float | None, digits: int = 2, unit: str = "", missing: str = "-") -> str:
    return missing if value is None else f"{value:.{digits}f}{unit}"


def ratio(record: Record, ours: str, other: str) -> str:
    """A speed-up, or why there is none."""
    if ours in record.wrong or other in record.wrong:
        return WRONG
    return number(record.speed_up(ours, other), unit="x")


class Table:
    """Prints rows as they come, in columns wide enough for their titles and for `widths`."""

    def __init__(self, titles: Sequence[str], widths: Mapping[str, int] | None = None) -> None:
        widths = widths or {}
        self._widths = [max(len(title), widths.get(title, 0)) for title in titles]
        self.row(titles)
        self.row(["-" * width for width in self._widths])

    def row(self, cells: Iterable[str]) -> None:
        padded = []
        for index, (cell, width) in enumerate(zip(cells, self._widths, strict=True)):
            padded.append(cell.ljust(width) if index == 0 else cell.rjust(width))
        print("  ".join(padded).rstrip(), flush=True)


def write_json(
    path: pathlib.Path, name: str, facts: Mapping[str, Any], records: Iterable[Record]
) -> None:
    document = {
        "benchmark": name,
        "machine": dict(facts),
        "records": [record.to_json() for record in records],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
