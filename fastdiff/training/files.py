"""Files that are whole or not there at all: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".tmp-"

# Where files cannot be locked, only those older than this (seconds) are taken for left over.
_OLD = 3600

# A FIFO without a writer, or a device, must not stop the process that opens it.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def read_file(path: str | Path, most: int | None = None) -> bytes:
    """Return a file's content.

    Raises
    ------
    OSError
        It cannot be read; or it is a FIFO, a socket or a device, which could make the reader wait
        for ever; or it has more than ``most`` bytes.
    """
    path = Path(path)
    descriptor = os.open(path, os.O_RDONLY | _NO_WAIT)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"it is larger than {most} bytes", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            # None: a file of the kernel's that would let its reader wait.
            return file.read() or b""
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        _write(file, data)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is either the old one or the new one at any moment.

    Of several processes that write it at the same time one wins.
    """
    with _beside(path, data) as temporary:
        temporary.replace(path)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, and that one process alone succeeds in.

    Raises
    ------
    FileExistsError
        When it is there already.
    """
    with _beside(path, data) as temporary:
        try:
            os.link(temporary, path)  # fails if there is one, which a rename does not
        except FileExistsError:
            raise
        except OSError:
            # Some file systems have no links (FAT, mounted cloud storage). Two processes that get
            # here in the same instant are not told apart.
            if path.exists():
                raise FileExistsError(path) from None
            temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk (a no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb+") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def remove_leftovers(folder: Path, pattern: str = TEMPORARY + "*") -> None:
    """Remove temporary files that a killed process left; not those that one is writing.

    Folders are removed too: they are made by the one process that holds the run's lock.
    """
    for path in folder.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif _is_leftover(path):
            path.unlink(missing_ok=True)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed or the process ends, however it ends.

    Returns
    -------
    bool or None
        Whether nobody else has it; None: files there cannot be locked.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


@contextmanager
def _beside(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A synced temporary file with this content, locked by us; gone at the end."""
    # Not with the name itself in it, which may be as long as a name can be.
    name = TEMPORARY + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    remove_leftovers(path.parent, name + "-*")
    while True:
        temporary = path.with_name(f"{name}-{secrets.token_hex(4)}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(temporary, flags, 0o666), "wb")
        # Another process may have taken it for a leftover before it was locked.
        if try_lock(file.fileno()) is not False and os.fstat(file.fileno()).st_nlink:
            break
        file.close()
    try:
        with file:
            _write(file, data)
            if os.name == "nt":
                file.close()  # an open file cannot be renamed there
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write(file, data: bytes | memoryview) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _is_leftover(path: Path) -> bool:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return True
        with open(os.open(path, os.O_RDWR | _NO_WAIT | _NO_LINK), "rb+") as file:
            locked = try_lock(file.fileno())
    except OSError:
        return False
    return time.time() - found.st_mtime > _OLD if locked is None else locked
