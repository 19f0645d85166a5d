"""The project's performance targets, and what a report says about each of them.

A target is a least geometric mean over the rows it is about (for some also a least value of every
row), or a largest value. All of it is read from a report's JSON, so that pages can be made again
without measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import report
from benchmarks.report import Row
from benchmarks.shapes import OUT_OF_CACHE_BYTES
from benchmarks.suite import OURS

ELEMENTWISE = ("q_sample", "eps_loss", "posterior_mean", "ddim_step", "vlb_terms")


@dataclass(frozen=True)
class Target:
    """`least` bounds the geometric mean, `lowest` every value; `most` bounds every value."""

    key: str
    text: str
    value: Callable[[Row], float | None]
    chosen: Callable[[Row], bool]
    least: float | None = None
    lowest: float | None = None
    most: float | None = None
    section: str = "ops"
    unit: str = "x"


@dataclass(frozen=True)
class Verdict:
    """`missing` are the rows on the wrong side, the worst first; `worst` is the closest to it."""

    target: Target
    met: bool | None  # None: not measured
    mean: float | None = None
    worst: tuple[str, float] | None = None
    missing: tuple[tuple[str, float], ...] = ()
    count: int = 0

    def __str__(self) -> str:
        target = self.target
        if self.met is None:
            return f"{target.text}: not measured"
        verdict = "met" if self.met else "MISSED"
        unit, (place, value) = target.unit, self.worst
        extreme = "highest" if target.most is not None else "lowest"
        line = f"{target.text}: {verdict}, "
        if target.most is None:
            line += f"geometric mean {self.mean:.2f}{unit}, "
        line += f"{extreme} {value:.2f}{unit} ({place}), {self.count} rows"
        return line + (f", {len(self.missing)} of them short" if self.missing else "")


def judge(target: Target, document: Mapping[str, Any]) -> Verdict:
    values = [
        (f"{row['op']} {report.where(row)}", value)
        for row in document.get(target.section, ())
        if target.chosen(row) and (value := target.value(row)) is not None
    ]
    if not values:
        return Verdict(target, None)
    upper = target.most is not None
    values.sort(key=lambda pair: pair[1], reverse=upper)
    if upper:
        missing = [pair for pair in values if pair[1] > target.most]
        met = not missing
        mean = None
    else:
        mean = report.geometric_mean([value for _, value in values])
        every = target.least if target.lowest is None else target.lowest
        missing = [pair for pair in values if pair[1] < every]
        met = mean >= target.least and (target.lowest is None or not missing)
    return Verdict(target, met, mean, values[0], tuple(missing), len(values))


def over(other: str) -> Callable[[Row], float | None]:
    return lambda row: report.speed_up(row, other)


def rows_of(op: str, *modes: str) -> Callable[[Row], bool]:
    return lambda row: row["op"] == op and (not modes or row["mode"] in modes)


def out_of_cache(op: str) -> Callable[[Row], bool]:
    return lambda row: row["op"] == op and report.tensor_bytes(row) >= OUT_OF_CACHE_BYTES


def microseconds(row: Row) -> float | None:
    seconds = report.seconds(row, OURS)
    return None if seconds is None else seconds * 1e6


def _group_norm() -> list[Target]:
    found = []
    for mode, words in (("forward", "forward"), ("fwd+bwd", "forward and backward")):
        for other, least in (("eager", 3.0), ("compile", 2.0)):
            name = {"eager": "eager PyTorch", "compile": "torch.compile"}[other]
            found.append(
                Target(
                    f"group_norm_silu-{mode.replace('+', '-')}-{other}",
                    f"group_norm_silu {words} >= {least:g}x {name} in the mean, never slower",
                    over(other),
                    rows_of("group_norm_silu", mode),
                    least=least,
                    lowest=1.0,
                )
            )
    return found


TARGETS: tuple[Target, ...] = (
    *_group_norm(),
    *(
        Target(
            f"{op}-copy",
            f"{op} out of cache >= 0.8 of copy bandwidth",
            report.of_copy,
            out_of_cache(op),
            least=0.8,
            unit="",
        )
        for op in ELEMENTWISE
    ),
    Target(
        "guided-step-diffusers",
        "guided sampler step >= 4x diffusers' scheduler step",
        over("diffusers"),
        rows_of("ddim_step", "guided"),
        least=4.0,
    ),
    Target(
        "overhead",
        "a call on a tiny tensor < 8 us",
        microseconds,
        lambda row: True,
        most=8.0,
        section="overhead",
        unit=" us",
    ),
)


def verdicts(document: Mapping[str, Any]) -> list[Verdict]:
    return [judge(target, document) for target in TARGETS]
