"""The choice between the CUDA kernels of group_norm_silu, as the launchers make it.

The function that chooses (csrc/include/fastdiff/group_norm_silu_plan.cuh) is host code: any C++
compiler makes a library of it, and no GPU is needed to ask it.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ptx_emulator.cache import build_once, cache_directory, digest
from ptx_emulator.compile import host_compiler

from .cuda_ptx.group_norm_silu import GroupNormLayout

_SOURCE = Path(__file__).with_name("group_norm_plan.cpp")
_HEADERS = Path(__file__).resolve().parents[2] / "csrc/include"


class Device(NamedTuple):
    shared_bytes: int  # per block
    multiprocessors: int
    max_cluster: int  # blocks per cluster


@dataclass
class Plan:
    """GroupNormPlan and its tiling."""

    one_pass: bool
    cluster: int
    threads: int
    shared_bytes: int
    blocks_per_sample: int
    items_per_block: int
    chunk_blocks: int
    chunk_segments: int
    chunks: int
    channels_last: bool
    channels: int
    block_channels: int
    blocks: int
    segments: int
    segment_pixels: int
    lanes: int
    samples: int

    @property
    def tiling(self) -> tuple[int, ...]:
        return self.channels, self.block_channels, self.segments, self.segment_pixels, self.lanes


@functools.cache
def _library() -> ctypes.CDLL:
    headers = sorted(_HEADERS.rglob("*.h")) + sorted(_HEADERS.rglob("*.cuh"))
    key = digest(host_compiler(), *(path.read_bytes() for path in (_SOURCE, *headers)))

    def build(target: Path) -> None:
        command = [*host_compiler().split(), "-std=c++20", "-O1", "-shared", "-fPIC"]
        command += [f"-I{_HEADERS}", str(_SOURCE), "-o", str(target)]
        subprocess.run(command, check=True)

    return ctypes.CDLL(str(build_once(cache_directory() / f"group-norm-plan-{key}.so", build)))


def plan(
    shape: tuple[int, int, int],
    groups: int,
    element_size: int,
    *,
    device: tuple[int, int, int],
    last: bool = False,
    backward: bool = False,
    vector: bool = True,
) -> Plan:
    """The plan for `shape` = (batch, channels, pixels); `vector`: whether 16-byte accesses fit."""
    batch, channels, pixels = shape
    layout = GroupNormLayout(batch, channels, groups, pixels, last)
    numbers = (ctypes.c_long * 17)()
    _library().plan_of(
        ctypes.byref(layout),
        16 // element_size if vector else 1,
        ctypes.c_long(element_size),
        int(backward),
        *(ctypes.c_long(device[0]), int(device[1]), int(device[2])),
        numbers,
    )
    return Plan(*numbers)


def device_limits(properties: Any) -> Device:
    """What the launchers find out about a device; `properties`: torch.cuda.get_device_properties.

    A device that is too small for a cluster of 16 has 8; see `choose_plan` in csrc/cuda.
    """
    clusters = {9: 16, 10: 16}.get(properties.major, 8) if properties.major >= 9 else 1
    shared = properties.shared_memory_per_block_optin
    return Device(shared, properties.multi_processor_count, clusters)
