"""Progress for people: a bar on a terminal, a line now and then in a pipe or a log."""

from __future__ import annotations

import sys
import time
from typing import Any

SECONDS = 10.0


def progress(total: int, unit: str, *, initial: int = 0, show: bool = True, **options: Any) -> Any:
    """A tqdm bar if standard error is a terminal, else `Lines`: no carriage returns in files.

    Parameters
    ----------
    total, initial
        How many of `unit` there are, and how many are done.
    show
        False: say nothing.
    options
        Of tqdm alone.
    """
    if show and not sys.stderr.isatty():
        return Lines(total, unit, initial)
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, unit=unit, disable=not show, **options)


class Lines:
    """What a bar would show, as a line on standard error every ten seconds; used like a tqdm."""

    def __init__(self, total: int, unit: str, initial: int = 0) -> None:
        self.n = self._initial = initial
        self.total, self.unit = total, unit
        self._note = ""
        self._start = self._said = time.monotonic()

    def update(self, num: int = 1) -> None:
        """Count `num` more."""
        self.n += num
        now = time.monotonic()
        if now - self._said >= SECONDS and self.n > self._initial:
            self._said = now
            left = (now - self._start) * (self.total - self.n) / (self.n - self._initial)
            note = f", {self._note}" if self._note else ""
            print(
                f"{self.n:,} of {self.total:,} {self.unit}s ({self.n / self.total:.0%}), about "
                f"{duration(left)} left{note}",
                file=sys.stderr,
                flush=True,
            )

    def set_postfix_str(self, text: str) -> None:
        """What the next line ends with."""
        self._note = text

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left open."""


def duration(seconds: float) -> str:
    """A time for people: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"
