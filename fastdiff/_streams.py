"""Standard streams that are closed, or whose reader leaves: the work goes on without them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Stream:
    """A text stream that goes nowhere once it cannot be written to.

    Attributes
    ----------
    error : OSError or None
        Why it could not; None also when its reader had seen enough (``| head``).
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            # Names of files may hold what the terminal's encoding does not.
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        if error.errno != errno.EPIPE:
            self.error = error
        # What is still in its buffer, and all that comes, has to go somewhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def standard() -> Iterator[tuple[Stream, Stream]]:
    """``sys.stdout`` and ``sys.stderr`` as such streams, while inside."""
    # Closed ones first: the next file that is opened would take their place.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    before = sys.stdout, sys.stderr
    # Python has None for one that was closed when it started.
    with open(os.devnull, "w") as nowhere:
        streams = [Stream(nowhere if stream is None else stream) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            yield streams[0], streams[1]
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = before
