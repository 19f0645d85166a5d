"""Ctrl-C that lets the current step end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

_STOPPING = (
    b"\nStopping after this step to save a checkpoint; press Ctrl-C again to quit at once.\n"
)
_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class Interrupt:
    """While active, the first SIGINT, SIGTERM or SIGHUP only sets `signum`.

    The same signal again acts as usual; another one does not: torchrun answers Ctrl-C, which its
    processes have had too, with SIGTERM. SIGHUP comes more than once when a terminal is closed, so
    it is ignored from then on; under ``nohup`` it is from the start.

    Signals can be caught in the main thread only; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            signums = [signal.SIGINT, signal.SIGTERM]
            if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:
                signums.append(_HANGUP)
            for signum in signums:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again = signal.SIG_IGN if signum == _HANGUP else self._previous[signum]
        signal.signal(signum, again)
        if self.signum is not None:
            return
        self.signum = signum
        # Not print: the signal may have come in the middle of one, which must not be entered again.
        with contextlib.suppress(OSError):  # nobody may be left to read it
            os.write(2, _STOPPING)
