"""Several processes over gloo: the same run, the same images, and an end when one of them dies."""

import contextlib
import dataclasses
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from host_waits import CountMethods, CountWaits
from PIL import Image

from fastdiff.sample import generate
from fastdiff.samplers import DDIM
from fastdiff.training import (
    RunError,
    RunFolder,
    TrainConfig,
    Trainer,
    UserError,
    load_run,
    snapshot,
)
from fastdiff.training.checkpoint import load_newest
from fastdiff.training.data import ArrayDataset, Batches
from fastdiff.training.distributed import World

SMALL = TrainConfig(
    preset="tiny",
    steps=50,
    batch_size=8,
    timesteps=50,
    warmup=3,
    lr=1e-3,
    log_every=10,
    sample_every=1000,
    checkpoint_every=1000,
    num_samples=10,
    sample_steps=2,
    device="cpu",
    class_cond=True,
    label_dropout=0.3,
    flip=True,
)
CPU = torch.device("cpu")
images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
DATASET = ArrayDataset(images, np.arange(30) % 3, ("a", "b", "c"))


def in_processes(size, work, *args):
    """Call ``work(world, *args)`` in `size` connected processes; give what each put back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: importing torch anew costs more than these tests.
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]

    def run(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)  # the parent's threads are not here
        try:
            world = World.from_environment()
            with world.joined(CPU):
                result = work(world, *args)
        except BaseException:
            result = traceback.format_exc()
        pipes[rank][1].send(result)

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(size)]
    results = {}
    try:
        for process in processes:
            process.start()
        for rank, (receiver, sender) in enumerate(pipes):
            sender.close()
            assert receiver.poll(240), f"rank {rank} hangs"
            # One that was killed has sent nothing.
            with contextlib.suppress(EOFError):
                results[rank] = receiver.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def trainer(path, world, **changes):
    config = dataclasses.replace(SMALL, **changes)
    folder = RunFolder(Path(path))
    world.first(lambda: folder.create(config))
    return Trainer(config, DATASET, folder, CPU, world)


def everything(run):
    """All state of a run, as arrays that travel between processes."""
    taken = snapshot.take(run)
    tensors = {f"model.{name}": value for name, value in taken.model.items()}
    for index, average in enumerate(taken.emas):
        tensors |= {f"ema.{index}.{name}": value for name, value in average.items()}
    for index, state in taken.state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors |= {f"timesteps.{name}": value for name, value in taken.state["timesteps"].items()}
    return {name: value.detach().numpy().copy() for name, value in tensors.items()}


def flat(state, kind):
    return np.concatenate([v.ravel() for k, v in state.items() if k.startswith(kind)])


def train_and_draw(world, path):
    run = trainer(path, world, grad_accum=2)
    start = everything(run)
    assert run.train()
    loaded = load_run(path)
    sampler = DDIM(loaded.diffusion, steps=3)
    drawn = generate(loaded, sampler, 10, 7, torch.arange(10) % 3, batch_size=4, world=world)
    return start, everything(run), drawn.numpy()


def test_two_processes_train_the_same_model_and_draw_the_same_images(tmp_path):
    start, alone, _ = train_and_draw(World(), tmp_path / "one")
    results = in_processes(2, train_and_draw, tmp_path / "two")
    assert not isinstance(results[0], str), results[0]
    assert not isinstance(results[1], str), results[1]
    (_, first, drawn), (_, second, _) = results[0], results[1]
    for kind in ("model", "ema", "optimizer"):
        # Between the ranks to the bit.
        assert np.array_equal(flat(first, kind), flat(second, kind)), kind
    for kind in ("model", "ema"):
        # With one process up to the order of sums (float32: 1e-7 of the gradient), which Adam's
        # division and 50 steps amplify. Two seeds instead of one are as far apart as they moved.
        moved = np.linalg.norm(flat(alone, kind) - flat(start, kind))
        apart = np.linalg.norm(flat(alone, kind) - flat(first, kind))
        assert moved > 0.1
        assert apart < 1e-3 * moved, (kind, apart / moved)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two")]
    assert metrics[0].count("\n") == metrics[1].count("\n") == 5

    # The same weights drawn by one process.
    loaded = load_run(tmp_path / "two")
    sampler = DDIM(loaded.diffusion, steps=3)
    again = generate(loaded, sampler, 10, 7, torch.arange(10) % 3, batch_size=4)
    assert np.array_equal(drawn, again.numpy())
    assert len(np.unique(drawn)) > 10

    one = trainer(tmp_path / "two", World(), grad_accum=2, resume=True)
    one.restore(load_newest(one.folder.checkpoints, pytest.fail))
    picture = one.folder.samples / "step-00000050.png"
    by_two = picture.read_bytes()
    picture.unlink()
    assert one.train()  # nothing left but the grid
    assert picture.read_bytes() == by_two


def resume_half_way(world, path):
    changes = {
        "steps": 12,
        "grad_accum": 2,
        "batch_size": 16,
        "timesteps": 4,
        "timestep_sampler": "loss_second_moment",
        "loss": "kl",
        "variance": "learned_range",
        "self_conditioning": True,
    }
    whole = trainer(path / "whole", world, **changes)
    assert whole.train()
    part = trainer(path / "part", world, **changes)
    # One process is told to stop; all do, after the same step.
    assert not part.train(should_stop=lambda: world.rank == 1 and part.step == 5)
    assert part.step == 5
    world.any(False)  # rank 0 has written the checkpoint
    torch.manual_seed(123)
    again = trainer(path / "part", world, **changes, resume=True)
    again.restore(load_newest(again.folder.checkpoints, pytest.fail))
    assert again.train()
    return everything(whole), everything(again)


def test_two_processes_resume_bit_for_bit(tmp_path):
    results = in_processes(2, resume_half_way, tmp_path)
    for rank in (0, 1):
        assert not isinstance(results[rank], str), results[rank]
        expected, actual = results[rank]
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert np.array_equal(value, actual[name]), (rank, name)
    # Between the ranks to the bit.
    for name, value in results[0][0].items():
        assert np.array_equal(value, results[1][0][name]), name


HALVES = {
    "steps": 8,
    "grad_accum": 2,
    "timesteps": 4,
    "timestep_sampler": "loss_second_moment",
    "ema": (0.99, 0.5),
    "self_conditioning": True,
}


def one_half(world, path, resume, fsdp):
    """Four steps of eight."""
    changes = {**HALVES, "fsdp": fsdp, "channels_last": fsdp}
    run = trainer(path, world, **changes, resume=resume)
    if resume:
        run.restore(load_newest(run.folder.checkpoints, pytest.fail))
        assert run.step == 4
    assert run.train(should_stop=lambda: run.step == 4 and not resume) == resume
    weights = sum(parameter.numel() for parameter in run.parameters)
    moments = sum(state["exp_avg"].numel() for state in run.optimizer.state.values())
    average = sum(part.numel() for part in run.emas[0]._parameters[0])
    assert weights == moments == average
    return everything(run), weights


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    """The run that all others must equal: (its folder, state before, state after)."""
    path = tmp_path_factory.mktemp("undivided")
    run = trainer(path, World(), **HALVES)
    start = everything(run)
    assert run.train()
    return path, start, everything(run)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, False), (2, False)),
        ((2, False), (1, False)),
        ((1, True), (2, True)),
        ((2, True), (1, True)),
        ((2, True), (2, False)),
        ((2, False), (2, True)),
    ],
)
def test_a_run_goes_on_with_another_number_or_kind_of_processes(tmp_path, undivided, first, second):
    """(number, whether with --fsdp) of the first half of the steps and of the second."""
    path, start, whole = undivided
    kept = flat(whole, "model").size
    for (size, fsdp), resume in ((first, False), (second, True)):
        if size == 1:
            result, weights = one_half(World(), tmp_path / "run", resume, fsdp)
            assert weights == kept
            continue
        results = in_processes(2, one_half, tmp_path / "run", resume, fsdp)
        assert not isinstance(results[0], str), results[0]
        assert not isinstance(results[1], str), results[1]
        (result, one), (_, other) = results[0], results[1]
        if fsdp:
            # Both have half, up to odd rows.
            assert one + other == kept
            assert abs(one - other) < 0.1 * kept
    for kind in ("model", "ema", "optimizer", "timesteps"):
        expected, actual = flat(whole, kind), flat(result, kind)
        # Sums in another order, as above, over 8 steps.
        if kind in ("model", "ema"):
            size = np.linalg.norm(expected - flat(start, kind))
        else:
            size = np.linalg.norm(expected)
        assert size > 0
        assert np.linalg.norm(expected - actual) < 1e-4 * size, kind
    pictures = [folder / "samples/step-00000008.png" for folder in (path, tmp_path / "run")]
    grids = [np.asarray(Image.open(picture), int) for picture in pictures]
    assert np.abs(grids[0] - grids[1]).max() <= 1
    assert load_run(tmp_path / "run").step == 8


def count_waits(world, path):
    # Without classes, whose range is looked at on a CPU.
    run = trainer(path, world, timestep_sampler="loss_second_moment", class_cond=False)
    batch = torch.from_numpy(images[4 * world.rank :][:4]), None
    run._train_step(*batch)  # the optimizer's state is made
    with CountWaits() as waits, CountMethods(waits.seen):
        run._train_step(*batch)
    return waits.seen, int(run.timesteps.state_dict()["count"].sum())


def test_the_losses_of_all_processes_are_remembered_without_a_wait(tmp_path):
    assert in_processes(2, count_waits, tmp_path) == {0: ([], 16), 1: ([], 16)}


def lose_a_process(world, path, fsdp):
    run = trainer(path, world, checkpoint_every=3, fsdp=fsdp)

    def should_stop():
        if world.rank == 1 and run.step == 5:
            os._exit(9)
        return False

    try:
        run.train(should_stop=should_stop)
    except RunError as error:
        return f"ended: {error}"


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path, fsdp):
    results = in_processes(2, lose_a_process, tmp_path, fsdp)
    assert results.keys() == {0}
    assert results[0].startswith("ended: rank 0 of 2 lost the others")
    assert f"checkpoint of step 3 is intact, continue from it with --out {tmp_path}" in results[0]
    assert load_newest(tmp_path / "checkpoints", pytest.fail).step == 3


def fail_at_first(world):
    def refuse():
        raise UserError("no such folder")

    try:
        world.first(refuse)
    except UserError as error:
        return str(error)
    except SystemExit as left:
        return left.code


def test_what_rank_0_cannot_do_ends_all(tmp_path):
    assert in_processes(2, fail_at_first) == {0: "no such folder", 1: 2}


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_a_batch_are_the_batch(size):
    whole = iter(Batches(DATASET, 6, seed=3, start=24))
    share = 6 // size
    parts = [
        iter(Batches(DATASET, 6, seed=3, start=24, part=slice(r * share, (r + 1) * share)))
        for r in range(size)
    ]
    for _ in range(4):  # across the end of an epoch
        expected, labels = next(whole)
        shares = [next(part) for part in parts]
        assert torch.equal(torch.cat([x for x, _ in shares]), expected)
        assert torch.equal(torch.cat([y for _, y in shares]), labels)
    for batches in (whole, *parts):
        batches.close()


def test_batches_to_draw_are_whole_whoever_draws_them():
    alone = [part.tolist() for part in World().batches(10, 4)]
    assert alone == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shared = [World(rank, 2).batches(10, 4) for rank in (0, 1)]
    assert [part.tolist() for part in shared[0]] == [alone[0], alone[2]]
    assert [part.tolist() for part in shared[1]] == [alone[1]]


def test_a_batch_that_cannot_be_shared_equally_is_refused(tmp_path):
    config = dataclasses.replace(SMALL, grad_accum=2)
    with pytest.raises(UserError, match=r"--batch-size 8 .* 3 processes .*a multiple of 6"):
        Trainer(config, DATASET, RunFolder(tmp_path), CPU, World(0, 3))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "²"}, "RANK is '²'"),
        ({"LOCAL_RANK": "9" * 5000}, "LOCAL_RANK is '9{50}'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2.*torchrun"),
    ],
)
def test_an_environment_that_makes_no_sense_is_named(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        World.from_environment()


@pytest.mark.slow
def test_torchrun_trains_and_samples(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    flags = ["--steps", "4", "--batch-size", "8", "--num-samples", "4", "--sample-steps", "2"]
    flags += ["--out", "run", "--device", "cpu"]

    def call(*argv):
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = call(*start, "-m", "fastdiff.train", *flags)
    assert said.count("2 processes, each on cpu") == said.count("done: look at") == 1
    draw = ["fastdiff.sample", "run", "--num", "5", "--batch-size", "2", "--steps", "3"]
    # Behind the --, or torchrun takes --num for an abbreviation of its own flags.
    call(*start, "-m", "--", *draw, "--out", "two.npz", "--device", "cpu")
    call(sys.executable, "-m", *draw, "--out", "one.npz", "--device", "cpu")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"])
