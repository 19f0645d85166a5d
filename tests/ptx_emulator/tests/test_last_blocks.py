"""Launches of which only the last blocks run, on arrays that are mostly untouched address space."""

from __future__ import annotations

import numpy as np
import pytest

from .. import OutOfBounds, compile_ptx, run
from .support import needs_nvcc

pytestmark = needs_nvcc

BLOCK = 256
N = 2**31 + 3 * BLOCK + 7


def increment(index_type: str) -> str:
    return compile_ptx(f"""
extern "C" __global__ void increment(unsigned char* x, long long n) {{
  {index_type} i = ({index_type})blockIdx.x * {BLOCK} + threadIdx.x;
  if (i < n) x[i] = x[i] + 1;
}}
""")


def test_only_the_last_blocks_run() -> None:
    x = np.zeros(N, np.uint8)  # two gigabytes of address space
    grid = -(-N // BLOCK)
    result = run(increment("long long"), None, [x, N], grid, BLOCK, last_blocks=2)
    assert result.blocks == 2
    changed = (grid - 2) * BLOCK
    assert (x[changed:] == 1).all()
    assert (x[changed - BLOCK : changed] == 0).all()


def test_a_32_bit_index_is_out_of_bounds() -> None:
    x = np.zeros(N, np.uint8)
    with pytest.raises(OutOfBounds):
        run(increment("int"), None, [x, N], -(-N // BLOCK), BLOCK, last_blocks=2)


def test_more_blocks_than_there_are() -> None:
    x = np.zeros(1000, np.uint8)
    result = run(increment("int"), None, [x, 1000], 4, BLOCK, last_blocks=9)
    assert result.blocks == 4
    assert (x == 1).all()
