"""Streams that are closed, full, or whose reader has left: the work goes on, the code is its own.

In a process of its own each time, as a shell starts one (here forked, with torch imported).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import matplotlib.figure  # noqa: F401 (once, not in every process)
import pytest
import sklearn.datasets  # noqa: F401
import tyro  # noqa: F401
from commands import Command
from tiny import TINY

from fastdiff import info, verify
from fastdiff.nn import PRESETS
from fastdiff.training import RunFolder
from fastdiff.training.checkpoint import load_newest

FLAGS = ["--preset", "tiny", "--steps", "4", "--batch-size", "8", "--timesteps", "20"]
FLAGS += ["--sample-steps", "2", "--num-samples", "4", "--log-every", "2", "--device", "cpu"]

OUT, ERR = 1, 2


def closed(*descriptors):
    """What ``>&-`` or ``2>&-`` does: Python then has None for the stream."""

    def before():
        for descriptor in descriptors:
            name = {OUT: "stdout", ERR: "stderr"}[descriptor]
            setattr(sys, name, None)
            os.close(descriptor)

    return before


def into(path, *descriptors):
    def before():
        file = os.open(path, os.O_WRONLY)
        _replace(descriptors, file)

    return before


def reader_lost(*descriptors):
    """What ``| true`` does."""

    def before():
        read, write = os.pipe()
        os.close(read)
        _replace(descriptors, write)

    return before


def _replace(descriptors, file):
    for descriptor in descriptors:
        os.dup2(file, descriptor)
    os.close(file)
    # Python looks whether they can seek when it makes them.
    if OUT in descriptors:
        sys.stdout = os.fdopen(OUT, "w", closefd=False)
    if ERR in descriptors:
        sys.stderr = os.fdopen(ERR, "w", buffering=1, errors="backslashreplace", closefd=False)


HARMLESS = {
    "readers lost": reader_lost(OUT, ERR),
    "stdout closed": closed(OUT),
    "stderr closed": closed(ERR),
    "stderr full": into("/dev/full", ERR),
}


@pytest.fixture(scope="module", autouse=True)
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        for name, module in (("info", info), ("verify", verify)):
            patch.setattr(module, "NEEDS", (), raising=False)
            patch.setitem(commands.MODULES, name, module)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run that is hardly trained."""
    folder = tmp_path_factory.mktemp("streams")
    assert commands.run("train", *FLAGS, "--out", "run", folder=folder).code == 0
    return folder


def ended(name, *argv, folder, before) -> Command:
    """It has ended without a traceback on what is left of its streams."""
    command = Command(name, argv, folder, before)
    command.wait(120)
    assert command.code != commands.CRASHED, command.error
    assert "Traceback" not in command.error + command.output
    return command


@pytest.mark.parametrize("before", HARMLESS.values(), ids=HARMLESS.keys())
def test_training_saves_its_checkpoint(tmp_path, before):
    assert ended("train", *FLAGS, folder=tmp_path, before=before).code == 0
    folder = RunFolder(tmp_path / "runs/digits")
    assert load_newest(folder.checkpoints, pytest.fail).step == 4
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]  # and nothing else in it
    assert folder.grid(4).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("before", HARMLESS.values(), ids=HARMLESS.keys())
def test_the_other_commands_end_as_if_somebody_read_them(run, before):
    argv = {
        "sample": ["run", "--num", "2", "--steps", "2", "--out", "x.png", "--force"],
        "evaluate": ["run", "--reconstruction", "--num", "4", "--steps", "2"],
        "verify": ["--op", "posterior_mean", "--backend", "reference"],
        "info": ["--json"],
    }
    for name, arguments in argv.items():
        device = [] if name == "info" else ["--device", "cpu"]
        command = ended(name, *arguments, *device, folder=run, before=before)
        assert command.code == 0, (name, command.error)
    assert (run / "x.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((run / "run/evaluation/reconstruction.json").read_text())
    assert result["num"] == 4
    for name, wrong in (("train", "--steps=0"), ("sample", "nowhere"), ("info", "--nothing")):
        assert ended(name, wrong, folder=run, before=before).code == 2, name


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_results_that_could_not_be_written_are_an_error(run):
    for name, argv in (
        ("evaluate", ["run", "--reconstruction", "--num", "4", "--steps", "2", "--device", "cpu"]),
        ("info", []),
        ("train", ["--help"]),
    ):
        command = ended(name, *argv, folder=run, before=into("/dev/full", OUT))
        assert command.code == 1, name
        last = command.error.splitlines()[-1]
        assert last.endswith("error: cannot write to standard output: No space left on device")


def test_info_whose_reader_leaves_says_nothing(tmp_path):
    """Started anew, with the streams that Python itself makes."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-u", "-m", "fastdiff.info"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == b""
    assert process.returncode == 0
