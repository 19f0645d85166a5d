"""Seconds per call of several functions, measured in turns in one process.

Contenders take turns, so that a slow moment of the machine meets all of them; the order rotates, so
that no one always runs in the caches that the same other one left behind. The median is the number
to quote, and the distance between the quartiles says how far to trust it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[[], object]

# Short functions are called until a sample takes this long: long enough that neither the clock's
# own cost (about 0.1 us) nor the caches left cold by the previous contender count.
SAMPLE_SECONDS = 2e-4


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per round; each is the mean of `calls` calls."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


class CpuClock:
    """Wall time. Data stays in whichever cache the previous call left it in."""

    def sample(self, function: Function, calls: int) -> Callable[[], float]:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds = (time.perf_counter() - start) / calls
        return lambda: seconds


class CudaClock:
    """CUDA events around each call, after a write that evicts the inputs from the L2 cache.

    The write also keeps the GPU busy while Python launches the call, so that the events measure the
    kernels and not the gaps between launches, unless launching takes longer than the write.
    """

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._evict = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device)

    def sample(self, function: Function, calls: int) -> Callable[[], float]:
        events = []
        for _ in range(calls):
            self._evict.zero_()
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            events.append((start, end))

        def seconds() -> float:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3

        return seconds


def measure(
    functions: Mapping[str, Function],
    device: torch.device,
    rounds: int,
    max_seconds: float = float("inf"),
    sample_seconds: float = SAMPLE_SECONDS,
) -> dict[str, Timing]:
    """Time every function in `rounds` interleaved rounds.

    Parameters
    ----------
    functions
        By name; each runs once before the clock starts. Compiled code must be warm already.
    rounds
        Samples per function.
    max_seconds
        Stop early once this much time is spent, after three rounds at least.
    sample_seconds
        Length of a sample of a short function, on the CPU.
    """
    clock = CpuClock() if device.type == "cpu" else CudaClock(device)
    calls = {}
    for name, function in functions.items():
        clock.sample(function, 1)()
        once = clock.sample(function, 1)()
        calls[name] = max(1, round(sample_seconds / once)) if device.type == "cpu" else 1
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > max_seconds:
            break
        turn = done % len(names)
        pending = [
            (name, clock.sample(functions[name], calls[name]))
            for name in names[turn:] + names[:turn]
        ]
        for name, seconds in pending:
            samples[name].append(seconds())
    return {name: Timing(tuple(values), calls[name]) for name, values in samples.items()}


def capture(function: Callable[[], Any]) -> tuple[Function, Any]:
    """A CUDA graph of one call, as a function that replays it, and the result it writes to.

    A replay costs one launch however many kernels a call has: beside the eager time it separates
    what the kernels take from what Python and the launches take.

    Raises
    ------
    RuntimeError
        The call waits for the GPU or does something else that cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialization is not allowed during capture
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result
