"""What the device has to say beyond results: faults, misuse, and where the host waited."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

# Anything of these kinds fails a test that does not expect it.
PROBLEMS = {
    "kernel fault": "a kernel accessed memory that it was not given, raced, or hung",
    "launch refused": "the device would not accept a launch",
    "operator failed": "an operator of torch failed after its call had returned",
    "not implemented": "the software device lacks a function that was called",
    "foreign stream": "a kernel was put on another stream than torch's current one",
    "other device": "a kernel was given memory of another device",
    "freed memory": "a kernel was given memory that has been freed",
    "freed in use": "memory was freed while another stream had not yet used it",
}
# Folders whose lines are not the caller's.
_OUTSIDE = {"torch", "triton", "_pytest", "pluggy", "software_cuda", "ptx_emulator"}


@dataclass(frozen=True)
class Report:
    """`where` are the innermost three lines of Python outside of torch, innermost first."""

    kind: str
    what: str
    where: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}" + "".join(f"\n    at {line}" for line in self.where)


def _is_outside(filename: str) -> bool:
    """Whether a line is torch's, pytest's or the device's own, but for the device's own tests."""
    parts = Path(filename).parts
    own_test = "software_cuda" in parts and "tests" in parts[parts.index("software_cuda") :]
    return filename.startswith("<frozen") or (not own_test and not _OUTSIDE.isdisjoint(parts))


def _caller() -> tuple[str, ...]:
    frames = traceback.extract_stack()
    lines = [
        f"{frame.filename}:{frame.lineno} ({frame.name})"
        for frame in reversed(frames)
        if not _is_outside(frame.filename)
    ]
    return tuple(lines[:3])


@dataclass
class Reports:
    """All that was reported since the last `take`."""

    problems: list[Report] = field(default_factory=list)
    waits: list[Report] | None = None  # None: nobody asked

    def add(self, kind: str, what: str) -> None:
        if kind == "host wait":
            if self.waits is not None:
                self.waits.append(Report(kind, what, _caller()))
            return
        report = Report(kind, what, _caller())
        self.problems.append(report)
        print(f"software_cuda: {report}", file=sys.stderr)
