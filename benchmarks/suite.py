"""A workload, its contenders, and the gate: no number for a wrong result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastdiff
from benchmarks.timing import SAMPLE_SECONDS, Timing, capture, measure

OURS = "fastdiff"
COPIES = ("copy_", "clone")
GRAPH = " (graph)"


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `error` says what is wrong with a result, or None.

    A peer is a library that others maintain: a wrong result of it is reported and not timed, but
    does not fail the run.
    """

    run: Callable[[], Any]
    error: Callable[[Any], str | None]
    peer: bool = False


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
    """A measured workload.

    `wrong` holds the contenders that were not timed, and why; `peers_wrong` names those of them
    that do not fail the run.
    """

    labels: Mapping[str, str]
    bytes: int
    timings: Mapping[str, Timing]
    wrong: Mapping[str, str]
    own_bytes: Mapping[str, int]
    peers_wrong: frozenset[str] = frozenset()

    def bandwidth(self, name: str) -> float | None:
        """Counted bytes per second."""
        if name not in self.timings:
            return None
        return self.own_bytes.get(name, self.bytes) / self.timings[name].median

    def speed_up(self, ours: str, other: str) -> float | None:
        """How many times faster `ours` is."""
        if ours not in self.timings or other not in self.timings:
            return None
        return self.timings[other].median / self.timings[ours].median

    def of_copy(self, name: str = OURS) -> float | None:
        """Share of the bandwidth of the faster copy, if there is one of this size."""
        ours = self.bandwidth(name)
        copies = [b for copy in COPIES if (b := self.bandwidth(copy)) is not None]
        return None if ours is None or not copies else ours / max(copies)

    def failed(self) -> bool:
        return any(name not in self.peers_wrong for name in self.wrong)

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
            "peers_wrong": sorted(self.peers_wrong),
        }


def on_backend(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def forced() -> Any:
        with fastdiff.use_backend(backend):
            return call()

    return forced


def with_backends(workload: Workload, device: torch.device) -> Workload:
    """The same workload with a contender for every available backend but the default one."""
    ours = workload.contenders[OURS]
    default, names = fastdiff.default_backend(device.type), {"cuda": ("cuda", "triton")}
    contenders = dict(workload.contenders)
    for backend in (*names.get(device.type, ("cpu",)), "reference"):
        if backend != default and fastdiff.backends()[backend]:
            run_there = on_backend(backend, ours.run)
            contenders[f"{OURS} {backend}"] = Contender(run_there, ours.error)
    return Workload(workload.labels, workload.bytes, contenders, workload.own_bytes)


def copies(source: Tensor) -> dict[str, Contender]:
    """What the machine's memory can do: a copy into an old tensor, and one into a new tensor."""
    source = source.detach()
    target = torch.empty_like(source)

    def error(result: Tensor) -> str | None:
        return None if torch.equal(result, source) else "not a copy"

    runs = (lambda: target.copy_(source), source.clone)
    return {name: Contender(run, error) for name, run in zip(COPIES, runs, strict=True)}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel that torch.compile makes for exactly the shapes of the next call."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def run(
    workload: Workload,
    device: torch.device,
    rounds: int,
    max_seconds: float = float("inf"),
    sample_seconds: float = SAMPLE_SECONDS,
) -> Record:
    """Check every contender, then time those that are right; on CUDA as a graph as well."""
    wrong: dict[str, str] = {}
    functions = {}
    for name, contender in workload.contenders.items():
        if (error := contender.error(contender.run())) is not None:
            wrong[name] = error
            continue
        functions[name] = contender.run
        if device.type == "cuda" and name not in COPIES:
            try:
                replay, result = capture(contender.run)
            except RuntimeError as reason:
                # Said in the report; what cannot be captured still has its eager time.
                wrong[name + GRAPH] = f"no CUDA graph: {reason}"
                continue
            replay()
            if (error := contender.error(result)) is not None:
                wrong[name + GRAPH] = error
            else:
                functions[name + GRAPH] = replay
    timings = measure(functions, device, rounds, max_seconds, sample_seconds) if functions else {}
    excused = frozenset(
        name
        for name, why in wrong.items()
        if workload.contenders[name.removesuffix(GRAPH)].peer or why.startswith("no CUDA graph")
    )
    return Record(workload.labels, workload.bytes, timings, wrong, workload.own_bytes, excused)
