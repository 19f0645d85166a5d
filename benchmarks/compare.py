"""Two reports of `python -m benchmarks`: what became slower by more than the noise of both.

Times are divided by the drift between the runs: the median, over everything that is not ours, of
new over old. A machine that is slower as a whole does not make every op a regression. Noise is the
sum of both runs' spreads (distance between the quartiles over the median), and `FLOOR` where they
are closer: two starts of a process differ by that much in where their memory lies.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import report
from benchmarks.suite import OURS

FLOOR = 0.05
SECTIONS = ("ops", "overhead", "end_to_end")
# Facts of which a difference makes times incomparable.
MACHINE = ("cpu", "threads", "gpu", "simd")


@dataclass(frozen=True)
class Change:
    """New over old time of one contender, without the drift, and what noise explains."""

    place: str
    contender: str
    ratio: float
    noise: float

    @property
    def regressed(self) -> bool:
        return self.ratio > 1 + self.noise

    @property
    def improved(self) -> bool:
        return 1 / self.ratio > 1 + self.noise

    def __str__(self) -> str:
        return (
            f"{self.place}, {self.contender}: {self.ratio:.2f}x the old time "
            f"(noise {self.noise:.0%})"
        )


def is_ours(contender: str) -> bool:
    return contender.split(" ")[0] == OURS


def pairs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, dict, dict]]:
    """Place, contender, and what both runs know of it."""
    for section in SECTIONS:
        before = {(r["op"], report.where(r)): r for r in old.get(section, ())}
        for row in new.get(section, ()):
            key = row["op"], report.where(row)
            for name, found in row["contenders"].items():
                if key in before and name in before[key]["contenders"]:
                    yield " ".join(key), name, before[key]["contenders"][name], found


def drift(old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    """How much slower everything became that we did not write."""
    ratios = [
        n["median_s"] / o["median_s"] for _, name, o, n in pairs(old, new) if not is_ours(name)
    ]
    return statistics.median(ratios) if ratios else 1.0


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Of our contenders, the worst first."""
    factor = drift(old, new)
    found = [
        Change(
            place,
            name,
            after["median_s"] / before["median_s"] / factor,
            max(FLOOR, before["spread"] + after["spread"]),
        )
        for place, name, before, after in pairs(old, new)
        if is_ours(name)
    ]
    return sorted(found, key=lambda change: -change.ratio)


def suppressed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Our contenders that were right in the old report and are wrong in the new one."""
    lines = []
    for section in SECTIONS:
        right = {(r["op"], report.where(r)): r["contenders"] for r in old.get(section, ())}
        for row in new.get(section, ()):
            key = row["op"], report.where(row)
            lines += [
                f"{' '.join(key)}, {name}: {why}"
                for name, why in row["wrong"].items()
                if is_ours(name) and name in right.get(key, ())
            ]
    return lines


def print_comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """1 if anything of ours became slower by more than the noise, or wrong."""
    for fact in MACHINE:
        before, after = (document["machine"].get(fact) for document in (old, new))
        if before != after:
            print(f"other {fact}: {before} in the old report, {after} now: times say little")
    found = changes(old, new)
    if not found:
        print("nothing to compare: no row is in both reports")
        return 1
    print(f"{len(found)} times compared; the others' times are {drift(old, new):.2f}x the old ones")
    worse = [change for change in found if change.regressed]
    broken = suppressed(old, new)
    better = [change for change in found if change.improved]
    for title, lines in (("slower", worse), ("wrong now", broken), ("faster", better[::-1])):
        if lines:
            print(f"{title}:")
            print("\n".join(f"  {line}" for line in lines))
    if not worse and not broken:
        print("no regression")
    return int(bool(worse or broken))
