"""Files that are whole or not there, and reads that cannot wait for ever."""

import multiprocessing
import os
import signal

import pytest

from fastdiff.training import files
from fastdiff.training.files import read_file, remove_leftovers, write_atomic

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "absent"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(OSError) as error:  # noqa: PT011 (any)
        read_file(path)
    assert error.value.filename == str(path)
    assert error.value.strerror


def test_a_file_larger_than_expected_is_not_read(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(OSError, match="larger than 1000 bytes"):
        read_file(tmp_path / "file", 1000)


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("n" * 255)
    write_atomic(path, b"content")
    assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == [path.name]


def test_new_files_have_the_rights_that_the_user_gives_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def write_for_ever(path, content, started):
    while True:
        write_atomic(path, content)
        started.set()


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    path, contents = tmp_path / "file", [bytes([k]) * 100_000 for k in range(3)]
    started = [FORK.Event() for _ in contents]
    writers = [
        FORK.Process(target=write_for_ever, args=(path, c, s), daemon=True)
        for c, s in zip(contents, started, strict=True)
    ]
    for writer in writers:
        writer.start()
    assert all(event.wait(60) for event in started)
    for _ in range(200):
        assert path.read_bytes() in contents
        remove_leftovers(tmp_path)  # not what they are writing
    assert all(writer.is_alive() for writer in writers)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    # The next write of the file removes what the killed have left of it.
    write_atomic(path, b"last")
    assert os.listdir(tmp_path) == ["file"]


def test_where_files_cannot_be_locked_only_old_ones_are_left_over(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "try_lock", lambda descriptor: None)
    young, old = tmp_path / ".tmp-young", tmp_path / ".tmp-old"
    for path in (young, old):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [young.name]
