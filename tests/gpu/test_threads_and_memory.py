"""Two threads on one device, and a device without room."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from gpu.memory import room
from gpu.needs import GPU
from torch import Tensor

import fastdiff
from fastdiff import NoiseSchedule, ops

pytestmark = GPU

# One needs opted-in shared memory where the other needs none, of the same kernel.
LARGE, SMALL = (1, 2048, 4, 4), (1, 64, 4, 4)


def normed(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + shape[1])
    x = torch.randn(shape, generator=generator).bfloat16().cuda()
    weight = torch.randn(shape[1], generator=generator).cuda()
    return lambda: ops.group_norm_silu(x, 2, weight, weight)


@pytest.mark.parametrize("streams", ["one stream", "a stream each"])
def test_two_threads_on_one_device(streams: str, backend: str) -> None:
    """Launches of one kernel with different amounts of shared memory do not disturb each other."""
    calls = [normed(LARGE), normed(SMALL)]
    results: list[list[Tensor]] = [[], []]
    errors: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        try:
            stream = torch.cuda.Stream() if streams != "one stream" else torch.cuda.current_stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream), fastdiff.use_backend(backend):
                barrier.wait(60)
                for _ in range(20):
                    results[index].append(calls[index]())
            stream.synchronize()
        except BaseException as error:
            errors.append(error)

    with fastdiff.use_backend(backend):
        expected = [call() for call in calls]
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a thread hangs"
    assert not errors, errors
    for found, wanted in zip(results, expected, strict=True):
        assert len(found) == 20
        assert all(torch.equal(one, wanted) for one in found)


SCHEDULE = NoiseSchedule.linear(1000)


def _calls(x: Tensor) -> dict[str, Callable[[], object]]:
    t = torch.zeros(1, dtype=torch.long, device=x.device)
    tables, steps = SCHEDULE.tables(x.device), SCHEDULE.ddim_table(torch.arange(0, 900, 90))
    steps, ddpm = steps.to(x.device), SCHEDULE.ddpm_table(torch.arange(10)).to(x.device)
    a, s = tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar
    return {
        "q_sample": lambda: ops.q_sample(x, t, a, s, seed=1),
        "posterior_mean": lambda: ops.posterior_mean(x, x, t, a, s),
        "philox_normal": lambda: ops.philox_normal(x.shape, 1, device=x.device),
        "ddim_step": lambda: ops.ddim_step(x, x, t, steps),
        "ddpm_step": lambda: ops.ddpm_step(x, x, t, ddpm, seed=1),
        "group_norm_silu": lambda: ops.group_norm_silu(x, 4, None, None),
    }


@pytest.mark.parametrize(
    "op",
    ["q_sample", "posterior_mean", "philox_normal", "ddim_step", "ddpm_step", "group_norm_silu"],
)
def test_no_room_for_a_result(op: str, backend: str) -> None:
    """torch.OutOfMemoryError, and the next call that has room works."""
    x = torch.zeros(1, 8, 1024, 1024, device="cuda")  # 32 MB
    small = torch.ones(1, 8, 4, 4, device="cuda")
    with fastdiff.use_backend(backend):
        calls, after = _calls(x), _calls(small)
        expected = after[op]()
        with room(8), pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            calls[op]()
        assert torch.equal(after[op](), expected)
