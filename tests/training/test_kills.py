"""SIGKILL at every step of a checkpoint's writing and at random moments of a run; a full disk."""

import dataclasses
import functools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from fastdiff.training import (
    Checkpoint,
    RunError,
    RunFolder,
    TrainConfig,
    Trainer,
    UserError,
    checkpoint,
)
from fastdiff.training.data import ArrayDataset

CPU = torch.device("cpu")
DATASET = ArrayDataset(np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8))
SMALL = TrainConfig(
    preset="tiny",
    steps=12,
    batch_size=4,
    timesteps=50,
    warmup=3,
    log_every=5,
    sample_every=1000,
    checkpoint_every=1,
    num_samples=1,
    sample_steps=1,
    device="cpu",
)
FORK = multiprocessing.get_context("fork")


def trainer(path, resume=False):
    config = dataclasses.replace(SMALL, resume=resume)
    folder = RunFolder(Path(path))
    folder.create(config)
    run = Trainer(config, DATASET, folder, CPU)
    if resume:
        # A damaged checkpoint would fail the test: what is killed leaves none.
        newest = checkpoint.load_newest(folder.checkpoints, pytest.fail)
        if newest is not None:
            run.restore(newest)
    return run


def forked(work, *args):
    """A process that calls work(*args) with one thread: the parent's others are not in it."""

    def alone():
        torch.set_num_threads(1)
        # tqdm's own is shared with the parent: who is killed while holding it never gives it back.
        tqdm.set_lock(threading.RLock())
        work(*args)

    process = FORK.Process(target=alone, daemon=True)
    process.start()
    return process


def some_checkpoint(step):
    tensors = {"w": torch.full((3,), float(step))}
    return Checkpoint(step, {}, tensors, [tensors], {"step": step})


CALLS = ("mkdir", "open", "link", "rename", "replace", "unlink", "rmdir", "fsync")


def killed_before(nth, work):
    """Do some work, and be killed before its n-th call that touches the disk."""
    count = 0

    def counting(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    work()


def test_killed_before_any_call_of_a_save_it_leaves_a_whole_checkpoint(tmp_path):
    found = []
    for nth in range(1, 100):
        folder = tmp_path / str(nth)
        for step in (1, 2):
            checkpoint.save(folder, some_checkpoint(step), keep=2)
        save = functools.partial(checkpoint.save, folder, some_checkpoint(3), keep=2)
        process = forked(killed_before, nth, save)
        process.join(60)
        newest = checkpoint.load_newest(folder, pytest.fail)
        assert torch.equal(newest.model["w"], torch.full((3,), float(newest.step)))
        found.append(newest.step)
        # The next save cleans up whatever was left.
        checkpoint.save(folder, some_checkpoint(4), keep=2)
        left = sorted(path.name for path in folder.iterdir())
        assert left == [f"step-{newest.step:08d}", "step-00000004"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    # The old one until the rename, the new one from then on.
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert len(found) > 10


def test_killed_before_any_call_of_its_start_a_run_starts_or_resumes(tmp_path):
    resumable = []
    for nth in range(1, 100):
        folder = RunFolder(tmp_path / str(nth))
        process = forked(killed_before, nth, functools.partial(folder.create, SMALL))
        process.join(60)
        resumable.append(folder.config.exists())
        if resumable[-1]:
            assert folder.saved_config("--resume") == SMALL
            with pytest.raises(UserError, match="continue that run with --resume"):
                folder.check_new()
            with pytest.raises(UserError, match="another process has started a run"):
                folder.create(SMALL)
        else:
            folder.check_new()
            folder.create(SMALL)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    # From the link on.
    assert resumable == sorted(resumable)
    assert set(resumable) == {False, True}
    assert [path.name for path in folder.path.iterdir() if path.is_file()] == ["config.json"]


def train_for_ever(path, resume, started):
    started.set()
    trainer(path, resume).train()


def kill_at_random(path, times, seed):
    """Kill and resume a run until it ends; what it ends with must not show it."""
    moments = random.Random(seed)
    killed, reached, resume = 0, 0, False
    while killed < times:
        started = FORK.Event()
        process = forked(train_for_ever, path, resume, started)
        assert started.wait(60)
        time.sleep(moments.uniform(0.0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        killed += 1
        resume = (path / "config.json").exists()
        newest = checkpoint.load_newest(path / "checkpoints", pytest.fail)
        step = 0 if newest is None else newest.step
        assert step >= reached
        reached = step
    last = trainer(path, resume)
    assert last.train()
    return last.unet.state_dict()


@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tmp_path, times):
    whole = trainer(tmp_path / "whole")
    assert whole.train()
    actual = kill_at_random(tmp_path / "killed", times, seed=times)
    for name, value in whole.unet.state_dict().items():
        assert torch.equal(actual[name], value), name


def fill_the_disk(path, sender):
    run = trainer(path)

    def should_stop():
        if run.step == 3:
            # Less than the weights: the write fails half-way, as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return False

    try:
        run.train(should_stop)
    except RunError as error:
        sender.send(str(error))


def test_a_write_that_fails_half_way_ends_with_a_message_and_resumes(tmp_path):
    receiver, sender = FORK.Pipe(duplex=False)
    process = forked(fill_the_disk, tmp_path, sender)
    assert receiver.poll(60)
    message = receiver.recv()
    process.join(60)
    assert message.startswith("step 4: cannot write ")
    assert "File too large; the checkpoint of step 3 is intact" in message
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"]
    again = trainer(tmp_path, resume=True)
    assert again.step == 3
    assert again.train()


FILL = """
set -e
mkdir disk
mount -t tmpfs -o size=$2 tmpfs disk
$1 --out disk/run --steps 6 $3 && exit 3
ls disk/run/checkpoints
mount -o remount,size=100m disk
$1 --out disk/run --resume
ls disk/run/checkpoints
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "saved"),
    [
        ("100k", ""),  # not even for a checkpoint of 12 MB
        ("20m", "step-00000001\n"),  # for one
    ],
)
def test_a_run_whose_disk_is_full_goes_on_when_there_is_room(tmp_path, size, saved):
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no namespace to mount a small disk in")
    train = f"{sys.executable} -m fastdiff.train --batch-size 4 --num-samples 1 --device cpu"
    flags = "--checkpoint-every 1 --sample-every 100 --keep 1"
    script = ["unshare", "-Urm", "sh", "-c", FILL, "sh", train, size, flags]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write " in done.stderr
    assert "No space left on device" in done.stderr
    assert done.stdout == saved + "step-00000006\n"
