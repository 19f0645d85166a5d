"""What the parts of the page share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.audit.executed import Launch
from benchmarks.roofline import Gpu
from benchmarks.speed_of_light import model


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main_launch(launches: Sequence[Launch], gpu: Gpu) -> tuple[Launch, model.Prediction]:
    """The longest launch of a call."""
    found = model.predict_call(launches, gpu)
    return max(zip(launches, found, strict=True), key=lambda pair: pair[1].seconds)
