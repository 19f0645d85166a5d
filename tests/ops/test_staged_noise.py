"""Banks of shared memory that the channels_last kernels use when they stage noise.

What a lane stores when is the kernel's own function, compiled for the host; the rest of the loop is
written down here. That the normals end up in their places is checked with the ops.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from ptx_emulator.cache import build_once, cache_directory, digest
from ptx_emulator.compile import host_compiler

_HEADERS = Path(__file__).resolve().parents[2] / "csrc/include"
_SOURCE = """
#include "fastdiff/elementwise.cuh"
extern "C" int turn(int block, int channels) { return fastdiff::staging_turn(block, channels); }
extern "C" int chunk(int channels, int vector) {
  const fastdiff::SampleLayout layout{1, 4096L * channels, channels, 64};
  return static_cast<int>(fastdiff::plan_chunks(layout, vector, true).elements);
}
"""


@functools.cache
def kernel() -> ctypes.CDLL:
    headers = sorted(_HEADERS.rglob("*.h")) + sorted(_HEADERS.rglob("*.cuh"))
    key = digest(_SOURCE, host_compiler(), *(path.read_bytes() for path in headers))

    def build(target: Path) -> None:
        source = target.with_suffix(".cpp")
        source.write_text(_SOURCE)
        command = [*host_compiler().split(), "-std=c++20", "-O1", "-shared", "-fPIC"]
        subprocess.run([*command, f"-I{_HEADERS}", source, "-o", target], check=True)

    return ctypes.CDLL(str(build_once(cache_directory() / f"staging-{key}.so", build)))


def passes(channels: int, vector: int, remainder: int = 0) -> list[int]:
    """Of every store of a warp, how many passes it takes: the most words in one bank.

    `remainder`: the place in its Philox block where channel 1's run of pixels begins; that of
    channel c is c times as far.
    """
    pixels = kernel().chunk(channels, vector) // channels
    blocks = pixels // 4 + 2
    found = []
    for first in range(0, channels * blocks, 32):
        for k in range(4):
            banks = defaultdict(set)
            for i in range(first, min(first + 32, channels * blocks)):
                block, c = divmod(i, channels)
                place = (k + kernel().turn(block, channels)) % 4
                pixel = 4 * block - c * remainder % 4 + place
                if 0 <= pixel < pixels:
                    word = pixel * channels + c
                    banks[word % 32].add(word)
            if banks:
                found.append(max(map(len, banks.values())))
    return found


@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("channels", [2, 3, 4, 6, 8, 12, 16, 32, 64, 256])
def test_stores_meet_in_a_bank_at_most_twice(channels, vector):
    found = passes(channels, vector)
    assert max(found) <= 2
    if channels in (2, 4, 8, 16, 32, 64, 256):
        assert max(found) == 1


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_runs_that_begin_inside_a_philox_block(channels):
    """Samples with an odd number of pixels."""
    found = passes(channels, 8, remainder=1)
    assert sum(found) / len(found) <= 2
