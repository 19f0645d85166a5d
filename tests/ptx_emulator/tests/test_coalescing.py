"""Sectors and widths of the requests of warps."""

from __future__ import annotations

import numpy as np
import pytest

from .. import run
from .support import needs_nvcc, ptx_of

pytestmark = needs_nvcc


def requests(entry, args, grid=1, block=32, seed=None):
    """(of loads, of stores)"""
    ptx = ptx_of("coalescing", "sm_80")
    total = run(ptx, entry, args, grid, block, seed=seed, count=True).counters.total
    return total.load_requests, total.store_requests


def floats(n):
    return np.arange(n, dtype=np.float32)


@pytest.mark.parametrize("seed", [None, 1])
def test_coalesced_copy(seed):
    x, y = floats(1024), floats(1024)
    for counted in requests("copy", [x, y, 1024], 2, 128, seed):
        assert (counted.requests, counted.sectors, counted.min_sectors) == (32, 128, 128)
        assert counted.widths == {4: 1024}
        assert (counted.sectors_per_request, counted.efficiency) == (4, 1)
        assert counted.sector_bytes == counted.bytes == 4096


@pytest.mark.parametrize("seed", [None, 1])
def test_vectorized_copy(seed):
    x, y = floats(1024), floats(1024)
    for counted in requests("copy4", [x, y, 256], 2, 64, seed):
        assert (counted.requests, counted.sectors, counted.min_sectors) == (8, 128, 128)
        assert counted.widths == {16: 256}


def test_last_warp_is_incomplete():
    loads, stores = requests("copy", [floats(45), floats(45), 45], 1, 64)
    assert loads == stores
    assert (loads.requests, loads.sectors, loads.min_sectors) == (2, 4 + 2, 4 + 2)


def test_view_that_begins_inside_a_sector():
    x, y = floats(33), floats(32)
    loads, stores = requests("copy", [x[1:], y, 32])
    assert (loads.sectors, loads.min_sectors) == (5, 4)
    assert (stores.sectors, stores.min_sectors) == (4, 4)


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (4, 16), (8, 32), (32, 32)])
def test_strided_loads_are_noticed(stride, sectors):
    loads, stores = requests("gather", [floats(32 * stride), floats(32), stride])
    assert (loads.sectors, loads.min_sectors) == (sectors, 4)
    assert loads.efficiency == 4 / sectors
    assert stores.sectors == 4


def test_one_address_for_the_whole_warp():
    loads, _ = requests("broadcast", [floats(4), floats(128)], 1, 128)
    assert (loads.requests, loads.sectors, loads.min_sectors) == (4, 4, 4)
    assert loads.bytes == 4 * 4  # of each request once
    assert loads.widths == {4: 128}


@pytest.mark.parametrize("seed", [None, 1])
def test_transposition(seed):
    x, y = floats(1024), floats(1024)
    loads, stores = requests("transpose", [x, y], 1, (32, 32), seed)
    assert (loads.sectors, stores.sectors) == (128, 1024)
    assert (loads.efficiency, stores.efficiency) == (1, 1 / 8)
    for counted in requests("transpose_in_shared", [x, y], 1, (32, 32), seed):
        assert (counted.requests, counted.sectors) == (32, 128)


def test_warp_comes_together_at_barriers():
    loads, _ = requests("skip_together", [floats(2048), floats(32)])
    assert (loads.requests, loads.sectors) == (2, 8)


def test_counts_per_array():
    x, w, y = floats(32), floats(32), floats(32)
    ptx = ptx_of("coalescing", "sm_80")
    counters = run(ptx, "two_arrays", [x, w, y], 1, 32, count=True).counters
    for parameter in (0, 1):
        array = counters.array(f"two_arrays_param_{parameter}")
        assert array.load_requests.sectors == array.load_requests.min_sectors == 2
        assert array.load_requests.widths == {4: 16}
    assert counters.array("two_arrays_param_2").store_requests.sectors == 4
