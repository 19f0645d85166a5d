"""What the CUDA kernels of group_norm_silu move: counted by the emulator, against the lower bound.

The bound is in tensor-sized accesses (reads and writes of a whole tensor): 2 forward and 3 backward
if the groups that must stay together fit on chip, else 3 and 5. On chip is the shared memory of one
block, or where there are clusters of 8 blocks (16 where a device has them). In channels_last those
groups are as many as fill 32-byte sectors, as less cannot be read without reading it twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .cuda_ptx import group_norm_silu as launchers
from .cuda_ptx.launcher import emulated_launches

PASSES = ("forward", "backward")
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10}
BLOCKS_PER_CLUSTER = {"sm_80": 1, "sm_90": 8}
TENSORS = {"forward": ("x", "y"), "backward": ("x", "grad", "grad_x")}


@dataclass(frozen=True)
class Traffic:
    """Of one call. `tensor_bytes` is the size of x."""

    tensor_bytes: int
    bytes: int
    sector_bytes: int
    min_sector_bytes: int
    blocks: tuple[int, ...]  # of the launches
    cluster: int
    narrow: int  # accesses to tensors that are not 16 bytes wide

    @property
    def accesses(self) -> float:
        """Bytes moved, in sizes of x."""
        return self.bytes / self.tensor_bytes

    @property
    def sectors(self) -> float:
        """32-byte sectors moved, relative to the fewest that hold the bytes."""
        return self.sector_bytes / self.min_sector_bytes


def bound(
    shape: tuple[int, ...],
    num_groups: int,
    element_size: int,
    channels_last: bool,
    which: str,
    arch: str,
) -> int:
    """Accesses of a perfect kernel."""
    group_channels = shape[1] // num_groups
    sector = 32 // element_size
    together = math.lcm(group_channels, sector) if channels_last else group_channels
    resident = math.prod(shape[2:]) * together * element_size * (1 if which == "forward" else 2)
    fits = resident <= SHARED_BYTES[arch] * BLOCKS_PER_CLUSTER[arch]
    return {"forward": 2, "backward": 3}[which] + (0 if fits else 1 if which == "forward" else 2)


def small_bytes(shape: tuple[int, ...], num_groups: int, operands: int, which: str) -> int:
    """Bytes besides the tensors, for float32 operands: each is read once per sample and channel.

    The backward pass writes their gradients; those of weight and bias are, beyond one sample, added
    up from two sums per sample and channel, which are written and read.
    """
    batch, channels = shape[:2]
    statistics = 2 * batch * num_groups
    floats = statistics + operands * batch * channels
    if which == "backward":
        floats += (operands - 2) * batch * channels + 2 * channels
        floats += 4 * batch * channels if batch > 1 else 0
    return 4 * floats


def measure(
    shape: tuple[int, ...],
    num_groups: int,
    operands: tuple[str, ...],
    activation: str,
    dtype: torch.dtype,
    channels_last: bool,
    which: str,
    arch: str,
) -> Traffic:
    """Run one call in the emulator and count."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def tensor() -> torch.Tensor:
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.contiguous(memory_format=memory_format)

    batch, channels = shape[:2]
    sizes = {"weight": (channels,), "bias": (channels,)}
    given = [
        torch.randn(sizes.get(name, (batch, channels)), generator=generator)
        if name in operands
        else None
        for name in launchers._OPERANDS
    ]
    number = ("silu", "identity").index(activation)
    x = tensor()
    with emulated_launches("group_norm_silu", arch, racecheck=False, count=True) as launches:
        if which == "forward":
            weight, bias, *rest = given
            launchers.group_norm_silu(x, num_groups, weight, bias, 1e-5, *rest, number)
        else:
            statistics = torch.ones(2, batch, num_groups)
            launchers.group_norm_silu_backward(
                tensor(),
                x,
                *statistics,
                num_groups,
                *given,
                number,
                True,
                *(value is not None for value in given),
            )
    counters = [launch.counters for launch in launches]
    requests = [r for c in counters for r in (c.total.load_requests, c.total.store_requests)]
    narrow = sum(
        n
        for c in counters
        for array in c.arrays
        if array.name in TENSORS[which]
        for r in (array.load_requests, array.store_requests)
        for width, n in r.widths.items()
        if width != 16
    )
    return Traffic(
        tensor_bytes=x.nbytes,
        bytes=sum(c.global_load_bytes + c.global_store_bytes for c in counters),
        sector_bytes=sum(r.sector_bytes for r in requests),
        min_sector_bytes=32 * sum(r.min_sectors for r in requests),
        blocks=tuple(launch.grid[0] for launch in launches),
        cluster=launches[0].cluster[0] if launches[0].cluster else 1,
        narrow=narrow,
    )
