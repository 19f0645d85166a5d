"""One process alone trains in a run folder."""

from __future__ import annotations

import datetime
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdiff.training.errors import UserError
from fastdiff.training.files import _NO_LINK, _NO_WAIT, try_lock

NAME = ".lock"

_held: set[str] = set()


@contextmanager
def locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold a run folder while inside: no other process can.

    The kernel lets go of it when the process ends, however it ends. Reading a run needs no lock.
    Inside of itself, in one process, this does nothing.

    Raises
    ------
    UserError
        Another process has it; the message names it. Or nothing can be written there.
    """
    key = os.path.realpath(folder)
    if key in _held:
        yield
        return
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK | _NO_WAIT, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from error
    with open(descriptor, "rb+", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path}: it is a pipe or a device, not a file; remove it")
        ours = try_lock(descriptor)
        holder = _holder(file.read(1000))
        if ours is False:
            raise UserError(
                f"{folder}: {holder or 'another process'} is training there; wait until it ends, "
                "or stop it (Ctrl-C, or kill with its number) and use --resume"
            )
        if ours is None:
            warn(
                f"{folder}: files cannot be locked there; see to it yourself that no other process "
                f"trains in it{f', such as {holder}' if holder else ''}"
            )
        elif holder and f" on {_here()} " not in holder:
            # Whether locks reach other machines, the file system does not say.
            warn(
                f"{folder}: {holder}, has not ended as it should; the folder could be locked, but "
                "if its file system has locks for each machine alone, make sure that this process "
                "has ended"
            )
        _tell(file, {"pid": os.getpid(), "host": _here(), "since": _now()})
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            _tell(file, None)


def _tell(file, holder: dict | None) -> None:
    """Write who has the lock, or nobody; for people, so that a full disk is no reason to stop."""
    try:
        file.seek(0)
        file.truncate()
        file.write(b"" if holder is None else json.dumps(holder).encode())
    except OSError:
        return


def _holder(content: bytes) -> str:
    """Who wrote this; nothing if it does not say."""
    try:
        values = json.loads(content)
        return f"process {values['pid']} on {values['host']} (since {values['since']})"
    except (ValueError, TypeError, KeyError):
        return ""


def _here() -> str:
    return socket.gethostname()


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
