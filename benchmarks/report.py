"""Tables for the terminal, JSON for machines, and what is read out of a row of that JSON."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.suite import COPIES, OURS, Record

WRONG = "wrong"
LABELS = ("shape", "dtype", "layout", "mode")
Row = Mapping[str, Any]


def print_facts(facts: Mapping[str, Any]) -> None:
    print("  ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    if "times" in facts:
        print(f"TIMES BELOW ARE {facts['times']}".rstrip())


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


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def to_json(document: Any, **layout: Any) -> str:
    """JSON text of what was measured.

    Raises
    ------
    SystemExit
        Some numbers are not finite: they are no measurement, and no JSON.
    """
    numbers = [*_numbers(document, "")]
    bad = [f"{where} is {value}" for where, value in numbers if not math.isfinite(value)]
    if bad:
        raise SystemExit(
            f"{len(bad)} of {len(numbers)} numbers are not finite, nothing was written: "
            + ", ".join(bad[:3])
        )
    return json.dumps(document, **layout) + "\n"


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{where}[{index}]")
    elif isinstance(value, float):
        yield where, value


def write_json(
    path: pathlib.Path, name: str, facts: Mapping[str, Any], records: Iterable[Record]
) -> None:
    document = {
        "benchmark": name,
        "machine": dict(facts),
        "records": [record.to_json() for record in records],
    }
    path.write_text(to_json(document, indent=1))


def where(row: Row) -> str:
    return " ".join(str(row[name]) for name in LABELS if name in row)


def seconds(row: Row, name: str = OURS) -> float | None:
    contender = row["contenders"].get(name)
    return None if contender is None else contender["median_s"]


def speed_up(row: Row, other: str, ours: str = OURS) -> float | None:
    """How many times faster we are than `other`."""
    mine, theirs = seconds(row, ours), seconds(row, other)
    return None if mine is None or theirs is None else theirs / mine


def bandwidth(row: Row, name: str = OURS) -> float | None:
    """Counted bytes per second."""
    contender = row["contenders"].get(name)
    return None if contender is None else contender["bytes"] / contender["median_s"]


def of_copy(row: Row) -> float | None:
    """Share of the bandwidth of the faster copy of a tensor of the same size."""
    ours = bandwidth(row)
    found = [b for name in COPIES if (b := bandwidth(row, name)) is not None]
    return None if ours is None or not found else ours / max(found)


def tensor_bytes(row: Row) -> int:
    """Size of the tensor that the row is about."""
    return next((row["contenders"][c]["bytes"] // 2 for c in COPIES if c in row["contenders"]), 0)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
