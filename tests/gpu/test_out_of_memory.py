"""A device without room for what a compiled op asks for: raw operators, copies, backward passes.

tests/test_out_of_memory.py has the same on the CPU, test_threads_and_memory.py public functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import ops

from .memory import room
from .needs import GPU

pytestmark = GPU


def raw_calls(x: Tensor) -> dict[str, Callable[[], object]]:
    batch, device, raw = x.shape[0], x.device, torch.ops.fastdiff
    t = torch.zeros(batch, dtype=torch.long, device=device)
    table, steps = torch.ones(10, device=device), torch.rand(3, 16, device=device)
    one, three = torch.ones((), device=device), torch.ones(3, batch, device=device)
    statistic, noise = torch.ones(batch, 8, device=device), (None, None, 0, 0)
    step = (t, steps, 0, True, False, None, 1.0, *noise, False)
    vlb = (x, x, x, t, steps, *noise, 0, False, True, False)
    return {
        "q_sample": lambda: raw.q_sample(x, t, table, table, *noise, None, None),
        "a copy": lambda: raw.q_sample(x.transpose(2, 3), t, table, table, *noise, None, None),
        "eps_loss_backward": lambda: raw.eps_loss_backward(one, x, *noise, None, 1, 0, True, False),
        "group_norm_silu": lambda: raw.group_norm_silu(x, 8, None, None, 1e-5, None, None, None, 0),
        "group_norm_silu_backward": lambda: raw.group_norm_silu_backward(
            *(x, x, statistic, statistic, 8, None, None, None, None, None, 0),
            *(True, False, False, False, False, False),
        ),
        "ddim_step": lambda: raw.ddim_step(x, x, *step),
        "ddpm_step": lambda: raw.ddpm_step(x, x, *step),
        "vlb_terms_backward": lambda: raw.vlb_terms_backward(three, *vlb),
    }


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_raw_operators_raise_torchs_own_error(mode) -> None:
    if not fastdiff.backends()["cuda"]:
        pytest.skip(fastdiff.backends()["cuda"].reason)
    x = torch.randn(16, 64, 64, 64, device="cuda")  # 16 MB
    for call in raw_calls(x).values():
        with room(1), mode(), pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.int64])
def test_every_size_of_elements_is_asked_for_again(dtype: torch.dtype) -> None:
    """A result of 16 bits, a copy of an image in bytes, and one of the keys."""
    if not fastdiff.backends()["cuda"]:
        pytest.skip(fastdiff.backends()["cuda"].reason)
    table, narrow = torch.ones(10, device="cuda"), dtype == torch.int64
    x = torch.ones(1 << 21 if narrow else 16, 1 if narrow else 1 << 20, device="cuda")
    x = x if narrow else x.to(dtype)
    keys = None
    if dtype == torch.uint8:
        x = x.view(16, 1024, 1024).transpose(1, 2)
    if narrow:
        keys = torch.ones(x.shape[0], 2, dtype=dtype, device="cuda")[:, 0]
    t = torch.zeros(x.shape[0], dtype=torch.long, device="cuda")
    out = torch.float16 if dtype == torch.uint8 else None
    noise = (None, keys, None if narrow else 0, 0)
    with room(1), pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate \d+\.00 MiB"):
        torch.ops.fastdiff.q_sample(x, t, table, table, *noise, None, out)


def test_memory_that_is_there_at_the_second_try() -> None:
    """What watches for a full device, as a cache may, makes room before the error is raised."""
    if not fastdiff.backends()["cuda"]:
        pytest.skip(fastdiff.backends()["cuda"].reason)
    cache, watching, told = [torch.ones(16, 1 << 20, device="cuda")], threading.Event(), []

    def make_room(*numbers: int) -> None:
        if watching.is_set():
            told.append(numbers)
            cache.clear()

    x = torch.randn(16, 1 << 20, device="cuda")
    t, table = torch.zeros(16, dtype=torch.long, device="cuda"), torch.ones(10, device="cuda")
    torch._C._cuda_attach_out_of_memory_observer(make_room)
    with room(1), fastdiff.use_backend("cuda"):
        watching.set()
        found = ops.q_sample(x, t, table, table, noise=x)
        watching.clear()
    assert len(told) == 1
    assert torch.equal(found, 2 * x)


def test_backward_passes_raise_torchs_own_error(backend: str) -> None:
    x = torch.randn(16, 64, 64, 64, device="cuda", requires_grad=True)
    with fastdiff.use_backend(backend):
        for output in (ops.eps_loss(x, seed=0), ops.group_norm_silu(x, 8, None, None)):
            grad = torch.ones_like(output)
            with room(1), pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
                output.backward(grad)
