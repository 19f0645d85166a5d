"""The real command lines in a process of their own, forked: torch need not start anew for each."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from fastdiff import _cli, evaluate, sample, train

MODULES = {"train": train, "sample": sample, "evaluate": evaluate}
CRASHED = 99


class Command:
    """A command at work; its streams are files in ``folder``.

    Parameters
    ----------
    name : str
        "train", "sample" or "evaluate".
    argv : sequence of str
        Its arguments.
    folder : Path
        Working directory.
    before : callable
        Is called in the new process before the command.
    """

    def __init__(self, name, argv, folder: Path, before: Callable[[], None] = lambda: None):
        self.out, self.err = folder / f".{name}-out", folder / f".{name}-err"
        self.code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = CRASHED
        try:
            code = _run(name, list(map(str, argv)), folder, (self.out, self.err), before)
        except BaseException:
            traceback.print_exc(file=self.err.open("a"))
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """Its exit code, minus the number of the signal that ended it; None: it is at work."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def send(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def wait(self, seconds: float = 600) -> int:
        """Its exit code; killed, and an AssertionError, if it takes longer."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it hangs: {self.error}")
            time.sleep(0.005)
        return self.code

    def wait_for(self, path: Path) -> None:
        """Until there is something at a path."""
        end = time.monotonic() + 600
        while not path.exists():
            assert self.poll() is None, self.error
            assert time.monotonic() < end
            time.sleep(0.005)

    @property
    def error(self) -> str:
        """What it has said on stderr."""
        return self.err.read_text(errors="backslashreplace") if self.err.exists() else ""

    @property
    def output(self) -> str:
        return self.out.read_text(errors="backslashreplace") if self.out.exists() else ""


def run(name: str, *argv: object, folder: Path, before=lambda: None) -> Command:
    """A command that has ended by itself, without a traceback."""
    command = Command(name, argv, folder, before)
    command.wait()
    assert "Traceback" not in command.error, command.error
    assert command.code != CRASHED, command.error
    return command


def _run(name, argv, folder, files, before) -> int:
    torch.set_num_threads(1)
    # tqdm's own is shared with the parent: who is killed while holding it never gives it back.
    tqdm.set_lock(threading.RLock())
    os.chdir(folder)
    for descriptor, path in enumerate(files, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    # As Python makes them, not as pytest does; and its answers to signals, not those of a parent
    # that may ignore them.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before()
    sys.argv = [name, *argv]
    module = MODULES[name]
    try:
        _cli.run(module.PROGRAM, module.main, module.NEEDS)
    except SystemExit as stopped:
        return stopped.code or 0
