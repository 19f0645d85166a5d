"""Which kernels a call launched on the device, as the device saw it."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Launch:
    name: str
    blocks: int
    threads: int
    cluster: int | None  # blocks of one; None: a profiler does not say
    shared_bytes: int | None  # dynamic


@contextmanager
def recorded(part: str) -> Iterator[list[Launch]]:
    """Afterwards the list has the launches of kernels with `part` in their names, in order."""
    found: list[Launch] = []
    software = sys.modules.get("software_cuda")
    if software is not None and software.device.active:
        before = len(software.device.launches)
        yield found
        torch.cuda.synchronize()
        found += [
            Launch(
                launch.entry,
                math.prod(launch.grid),
                math.prod(launch.block),
                math.prod(launch.cluster or (1,)),
                launch.dynamic_shared_bytes,
            )
            for launch in software.device.launches[before:]
            if part in launch.entry
        ]
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        yield found
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kernels = [e for e in events if e.get("cat") == "kernel" and part in e["name"]]
    for event in sorted(kernels, key=lambda e: e["ts"]):
        seen = event["args"]
        blocks, threads = math.prod(seen["grid"]), math.prod(seen["block"])
        found.append(Launch(event["name"], blocks, threads, None, None))
