"""A workload, its contenders, and the gate: no number for a wrong result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import SAMPLE_SECONDS, Timing, measure


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `error` says what is wrong with a result, or None."""

    run: Callable[[], Tensor]
    error: Callable[[Tensor], str | None]


@dataclass(frozen=True)
class Workload:
    """One row: what is computed, how many bytes a perfect kernel moves, and who computes it."""

    labels: Mapping[str, str]
    bytes: int
    contenders: Mapping[str, Contender]
    # Contenders that move other bytes than the workload, such as a copy.
    own_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A measured workload. `wrong` holds the contenders that were not timed, and why."""

    labels: Mapping[str, str]
    bytes: int
    timings: Mapping[str, Timing]
    wrong: Mapping[str, str]
    own_bytes: Mapping[str, int]

    def bandwidth(self, name: str) -> float | None:
        """Counted bytes per second."""
        if name not in self.timings:
            return None
        return self.own_bytes.get(name, self.bytes) / self.timings[name].best

    def speed_up(self, ours: str, other: str) -> float | None:
        """How many times faster `ours` is."""
        if ours not in self.timings or other not in self.timings:
            return None
        return self.timings[other].best / self.timings[ours].best

    def to_json(self) -> dict[str, Any]:
        return {
            **self.labels,
            "bytes": self.bytes,
            "contenders": {
                name: {
                    "bytes": self.own_bytes.get(name, self.bytes),
                    "min_s": timing.minimum,
                    "median_s": timing.median,
                    "spread": timing.spread,
                    "rounds": len(timing.seconds),
                    "calls_per_round": timing.calls,
                }
                for name, timing in self.timings.items()
            },
            "wrong": dict(self.wrong),
        }


def run(
    workload: Workload,
    device: torch.device,
    rounds: int,
    max_seconds: float = float("inf"),
    sample_seconds: float = SAMPLE_SECONDS,
) -> Record:
    """Check every contender, then time those that are right."""
    wrong: dict[str, str] = {}
    for name, contender in workload.contenders.items():
        if (error := contender.error(contender.run())) is not None:
            wrong[name] = error
    functions = {n: c.run for n, c in workload.contenders.items() if n not in wrong}
    timings = measure(functions, device, rounds, max_seconds, sample_seconds) if functions else {}
    return Record(workload.labels, workload.bytes, timings, wrong, workload.own_bytes)
