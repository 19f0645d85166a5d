"""Tensors of more than 2^31 elements: only the last blocks run, on memory that is never touched."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_harness import assert_close, implementation_params
from torch import Tensor

from fastdiff import NoiseSchedule, ops, reference

NUMEL = 2**31 + 4096
TAIL = 2048  # elements that are looked at; the blocks that run cover more


@contextlib.contextmanager
def launches(op: str, implementation: str) -> Iterator[Any]:
    """The op's function with the raw operator's arguments, running the last 16 blocks only."""
    options = {"racecheck": False, "last_blocks": 16}
    if implementation == "cuda-ptx":
        from op_harness.cuda_ptx.launcher import emulated_launches

        with emulated_launches(op, **options):
            yield importlib.import_module(f"op_harness.cuda_ptx.{op}")
    else:
        from op_harness.triton_ptx import emulated_launches

        with emulated_launches(**options):
            yield None


def untouched(dtype: torch.dtype, tail: Tensor) -> Tensor:
    """(1, NUMEL) of address space that ends in `tail`."""
    x = torch.empty((1, NUMEL), dtype=dtype)
    x[0, -TAIL:] = tail
    return x


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
def test_q_sample(implementation: str) -> None:
    tables = NoiseSchedule.linear(1000).tables("cpu")
    levels = torch.arange(TAIL).to(torch.uint8)
    t = torch.tensor([300])
    arguments = (
        untouched(torch.uint8, levels),
        t,
        tables.sqrt_alpha_bar,
        tables.sqrt_one_minus_alpha_bar,
        *(None, None, 7, 0, None, torch.bfloat16),
    )
    with launches("q_sample", implementation) as emulated:
        if emulated:
            x_t = emulated.q_sample(*arguments)
        else:
            x_t = torch.ops.fastdiff.q_sample.triton(*arguments)
    # The noise of the last elements, from the blocks of the generator that belong to them.
    words = reference.sample_words(ops.sample_keys(7, 1), TAIL, first=NUMEL - TAIL)
    noise = reference.box_muller(words, torch.float64)[0]
    a, b = tables.sqrt_alpha_bar[t].double(), tables.sqrt_one_minus_alpha_bar[t].double()
    pixels = (2 * levels.double() - 255) / 255
    assert_close(
        x_t[0, -TAIL:],
        a * pixels + b * noise,
        magnitude=(a * pixels).abs() + (b * noise).abs(),
        operations=24,
    )
