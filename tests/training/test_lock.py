"""One process at a time in a run folder."""

import json
import multiprocessing
import os
import signal

import pytest

from fastdiff.training import UserError, lock
from fastdiff.training.lock import locked

FORK = multiprocessing.get_context("fork")


def hold(folder, ready):
    with locked(folder, print):
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_the_second_is_told_who_the_first_is(tmp_path, holder):
    with pytest.raises(UserError, match=rf"process {holder.pid} on .* is training there"):
        locked(tmp_path, pytest.fail).__enter__()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_the_kernel_lets_go_of_it_when_the_holder_is_killed(tmp_path, holder, signum):
    os.kill(holder.pid, signum)
    holder.join(60)
    with locked(tmp_path, pytest.fail):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert (tmp_path / lock.NAME).read_bytes() == b""


def test_in_one_process_it_may_be_held_twice_and_again(tmp_path):
    with locked(tmp_path, pytest.fail), locked(tmp_path, pytest.fail):
        pass
    with locked(tmp_path, pytest.fail):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    told = []
    with locked(tmp_path, told.append):
        pass
    assert len(told) == 1
    assert "files cannot be locked there" in told[0]


def test_a_holder_on_another_machine_that_has_not_ended_well_is_told(tmp_path):
    left = {"pid": 7, "host": "elsewhere", "since": "2026-01-01"}
    (tmp_path / lock.NAME).write_text(json.dumps(left))
    told = []
    with locked(tmp_path, told.append):
        pass
    assert "process 7 on elsewhere (since 2026-01-01), has not ended as it should" in told[0]


@pytest.mark.parametrize("content", [b"\xff\x00", b"[1]", b'{"pid": 3}', b"7" * 5000])
def test_what_is_in_the_file_is_nobodys_business(tmp_path, content):
    (tmp_path / lock.NAME).write_bytes(content)
    with locked(tmp_path, pytest.fail):
        pass


def test_a_pipe_or_a_link_in_its_place_is_refused(tmp_path):
    os.mkfifo(tmp_path / lock.NAME)
    with pytest.raises(UserError, match="it is a pipe or a device"):
        locked(tmp_path, pytest.fail).__enter__()
    (tmp_path / lock.NAME).unlink()
    (tmp_path / "outside").write_text("precious")
    (tmp_path / lock.NAME).symlink_to("outside")
    with pytest.raises(UserError, match="cannot write"):
        locked(tmp_path, pytest.fail).__enter__()
    assert (tmp_path / "outside").read_text() == "precious"
