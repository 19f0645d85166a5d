"""Triton kernels for test_reports.py."""

import triton
import triton.language as tl


@triton.jit
def fill_with_ones(x, n, BLOCK: tl.constexpr = 128):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + offsets, 1.0, mask=offsets < n)


@triton.jit
def write_number_of_block(x):
    tl.store(x, tl.program_id(0))


@triton.jit
def wait_for_a_one(x):
    while tl.atomic_add(x, 0) == 0:
        pass
