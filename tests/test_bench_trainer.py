"""bench_trainer's gate, and its profile."""

from __future__ import annotations

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks import bench_trainer
from benchmarks.suite import OURS

CPU = torch.device("cpu")
LABELS = {"network": "digits", "layout": "channels_last", "run as": "eager"}


def test_every_loop_passes_the_gate_and_a_broken_one_does_not() -> None:
    loops = bench_trainer.loops(LABELS, 64, CPU)
    assert OURS in loops
    sizes = [sum(w.numel() for w in loop.weights) for loop in loops.values()]
    assert max(sizes) < 1.1 * min(sizes)  # a width is a multiple of 8
    work = bench_trainer.workload(LABELS, loops)
    for name, contender in work.contenders.items():
        loss = contender.run()
        assert contender.error(loss) is None, name
        assert contender.error(loss * float("nan")) is not None, name
        assert contender.peer == (name != OURS)


def test_weights_that_stay_are_refused() -> None:
    pixels = bench_trainer.images("digits", 64)
    trainer = bench_trainer.our_trainer("digits", pixels, "nchw", False, CPU)
    loop = bench_trainer.our_loop(trainer, pixels)
    contender = bench_trainer.contender(loop, starts_at_zero=True, peer=False)
    trainer.learning_rate = lambda step: 0.0
    assert contender.error(contender.run()) == "its weights did not move"
    del trainer.learning_rate
    trainer.emas.clear()
    assert contender.error(contender.run()) == "its average did not move"
    assert contender.error(torch.tensor(2.0)) == "its loss is 2.0"


def test_profile_separates_convolutions() -> None:
    weight, x = torch.randn(8, 8, 3, 3), torch.randn(1, 8, 32, 32)
    times = bench_trainer.profile(lambda: torch.conv2d(x, weight).sin(), CPU)
    kinds = {key: kind for kind, key, _ in times}
    assert kinds["aten::sin"] == "rest"
    assert any(kind == "heavy" and "conv" in key for key, kind in kinds.items())
    assert all(ms >= 0 for _, _, ms in times)
    assert [ms for *_, ms in times] == sorted((ms for *_, ms in times), reverse=True)
