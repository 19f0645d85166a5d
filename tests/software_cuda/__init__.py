"""torch's "cuda" device in software: see README.md."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .reports import PROBLEMS, Report, Reports
from .settings import Settings, chosen

__all__ = ["PROBLEMS", "REPORTED", "Counts", "Report", "Settings", "activate", "device", "install"]

REPORTED = 70
"""Exit code of a process whose device has reported problems."""

_FOLDER = Path(__file__).resolve().parent


class Counts(ctypes.Structure):
    """Totals so far; `launches` are kernels, `operators` torch's own operators."""

    _fields_ = tuple((n, ctypes.c_int64) for n in ("host_waits", "launches", "mallocs", "frees"))
    operators: int


@dataclass
class Device:
    """The device of this process: what it was asked to be, what it did, and what went wrong."""

    settings: Settings | None = None
    runtime: Any = None
    fallback: Any = None
    emulation: Any = None
    reports: Reports = field(default_factory=Reports)

    @property
    def active(self) -> bool:
        """Whether torch has been imported with the device under it."""
        return self.fallback is not None

    @property
    def launches(self) -> list:
        """What the emulator ran: `entry` is a kernel's name."""
        return self.emulation.launches

    def counts(self) -> Counts:
        copy = Counts()
        self.runtime.sc_counters.restype = ctypes.c_void_p
        ctypes.memmove(ctypes.byref(copy), self.runtime.sc_counters(), ctypes.sizeof(copy))
        copy.operators = sum(self.operator_calls().values())
        return copy

    def operator_calls(self) -> dict[str, int]:
        """How often each of torch's own operators ran."""
        lines = self.fallback.sc_operator_calls().decode().splitlines()
        return {name: int(number) for name, number in (line.split() for line in lines)}

    def take_problems(self) -> list[Report]:
        """What went wrong since the last call; a device that had failed works again."""
        self.runtime.sc_flush_reports()
        found, self.reports.problems = self.reports.problems, []
        self.runtime.sc_reset_errors()
        return found

    def finish(self) -> None:
        """Run what is left to run, with the garbage that it uses freed before.

        Else a collection during a later test would free it, and that test be blamed, now and then.
        """
        if self.runtime.sc_pending():
            gc.collect()
            # They may not be all that use the memory.
            self.runtime.sc_wait_for_recorded_streams()
            with self.lazy(False):  # which runs everything
                pass

    def end(self) -> None:
        """At the end of the process: problems that nobody has taken are its exit code.

        Also those of work that nobody has waited for.
        """
        self.finish()
        if problems := self.take_problems():
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            message = f"software_cuda: the process ends with {len(problems)} reported problems\n"
            os.write(2, message.encode())
            os._exit(REPORTED)

    @contextlib.contextmanager
    def expect(self, kind: str) -> Iterator[list[Report]]:
        """For a test of a problem: yields what of this kind was reported inside, at least one."""
        if kind not in PROBLEMS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(PROBLEMS)}")
        before, self.reports.problems = self.take_problems(), []
        found: list[Report] = []
        try:
            yield found
        finally:
            inside = self.take_problems()
            found += [report for report in inside if report.kind == kind]
            self.reports.problems = before + [r for r in inside if r.kind != kind]
        assert found, f"no {kind}: {PROBLEMS[kind]}"

    @contextlib.contextmanager
    def host_waits(self) -> Iterator[list[Report]]:
        """Where the host waits for the device inside the block."""
        self.runtime.sc_flush_reports()
        found: list[Report] = []
        outer, self.reports.waits = self.reports.waits, found
        try:
            yield found
        finally:
            self.runtime.sc_flush_reports()
            self.reports.waits = outer

    @contextlib.contextmanager
    def lazy(self, flag: bool = True) -> Iterator[None]:
        """Run work only when something waits for it (True), or at once (False)."""
        before = bool(self.runtime.sc_lazy())
        self.runtime.sc_set_lazy(int(flag))
        try:
            yield
        finally:
            self.runtime.sc_set_lazy(int(before))

    @contextlib.contextmanager
    def jitter(self, microseconds: int) -> Iterator[None]:
        """Pause up to so long before launches, so that threads meet in many orders."""
        self.runtime.sc_set_jitter(microseconds)
        try:
            yield
        finally:
            self.runtime.sc_set_jitter(0)


device = Device()


def activate(settings: Settings) -> None:
    """Give this process, which has not imported torch yet, and its children the device."""
    waiting = _finder()
    if device.active or (waiting and waiting.settings == settings):
        return
    if waiting:
        sys.meta_path.remove(waiting)
    if "torch" in sys.modules:
        raise RuntimeError("the software CUDA device has to come before torch is imported")
    from . import build

    print(f"software CUDA device: {settings.arch}, building what is missing", file=sys.stderr)
    build.all_libraries(settings.arch)
    settings.write(os.environ)
    first = str(_FOLDER / "startup")
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if first not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([first, *paths])
    install()


def install() -> None:
    """Put the device under torch, once torch is imported, if the environment asks for it."""
    wanted = chosen()
    if wanted is not None and not device.active and _finder() is None:
        from .import_hook import TorchFinder

        sys.meta_path.insert(0, TorchFinder(wanted))


def _finder() -> Any:
    """What waits for the import of torch."""
    if (module := sys.modules.get(f"{__name__}.import_hook")) is None:
        return None
    return next((f for f in sys.meta_path if isinstance(f, module.TorchFinder)), None)
