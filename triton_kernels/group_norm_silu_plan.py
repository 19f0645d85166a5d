"""How the Triton kernels of group_norm_silu cut a sample into tiles."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import triton

from . import _launch
from .group_norm_silu_tiles import Tiling
from .reduce import DEVICE_PROGRAMS


class Plan(NamedTuple):
    """How one sample is cut into tiles. Nothing here depends on the batch size: nor do results."""

    one_pass: bool  # a program holds whole groups in registers
    groups: int  # whole groups in a span of channels
    channels: int  # tile: powers of two
    pixels: int  # of a block
    rounds: int  # pixel tiles that a program of a reduction adds up
    num_warps: int  # of a block
    blocks: int = 1  # of a program: a cluster
    pieces: int = 1  # that a held tile is cut into
    packed: bool = False  # elements of 16 bits are held in pairs

    def parts(self, channels: int, num_groups: int) -> int:
        """Channel tiles that a span is cut into; more than one only if it is a single group."""
        return _launch.cdiv(channels // num_groups * self.groups, self.channels)

    def channel_tiles(self, channels: int, num_groups: int) -> int:
        """Channel tiles of one sample."""
        return num_groups // self.groups * self.parts(channels, num_groups)

    def meta(self, channels: int, num_groups: int, channels_last: bool) -> dict[str, Any]:
        """Of the kernels that work on tiles: compile-time arguments and launch options."""
        tiling = Tiling(
            channels,
            channels // num_groups,
            self.groups,
            self.channels,
            self.pixels,
            channels_last,
            self.blocks,
            self.pieces,
            self.packed,
        )
        meta = {"TILING": tiling, "num_warps": self.num_warps, "num_ctas": self.blocks}
        if self.one_pass:
            meta["HELD"] = tiling.as_held()
        return meta


# Registers in which a block may hold tiles, of the 65536 of a multiprocessor. The rest is for
# addresses, small operands and the piece being worked on: with a larger share the kernels spill on
# sm_80, sm_90 or sm_100.
HELD = 32768
# The same for the backward pass of a cluster in channels_last. A thread has several channels there,
# and their coefficients take registers.
HELD_CROWDED = 16384
# At most so many channels in a cluster: its kernels compare each of them with each of its rows,
# which are eight times as many.
CLUSTER_CHANNELS = 128
SECTOR_BYTES = 32
WARP_BYTES = 512  # of one access by a whole warp
SPLIT_ELEMENTS = 4096  # per tile: 16 bytes for each of 128 threads, 4 times (bfloat16) or 8 times
# channels_last: two sectors of adjacent channels. Wider tiles would have fewer pixels, so there
# would be more of them and more partial sums.
SPLIT_WIDTH_BYTES = 64
REDUCTION_PROGRAMS = 512  # per sample: fills 132 multiprocessors at batch 1, and merges quickly
WASTE = 1.1  # sectors touched / needed


def _sector_waste(width: int) -> float:
    """Bytes of the sectors touched by rows of `width` bytes that begin at multiples of `width`."""
    starts = range(0, SECTOR_BYTES, math.gcd(width, SECTOR_BYTES))
    sectors = sum(_launch.cdiv(start + width, SECTOR_BYTES) for start in starts) / len(starts)
    return sectors * SECTOR_BYTES / width


@functools.lru_cache(maxsize=1024)
def plan(
    channels: int,
    num_groups: int,
    pixels: int,
    itemsize: int,
    channels_last: bool,
    arrays: int,
    max_blocks: int = 1,
    pairs: bool = True,
    plain: bool = True,
) -> Plan:
    """The choice for a sample, for a kernel that holds tiles of `arrays` tensors.

    One pass, in the registers of one block or of a cluster of at most `max_blocks`: of the
    smallest that can hold its groups, unless a larger one wastes less of the sectors it reads.
    Otherwise two passes. `pairs`: whether elements of 16 bits may be held in pairs. `plain`: no
    dropout or residual. They take registers, and in the long kernels of clusters that hold pairs
    more steps than a pass of Triton 3.8's compiler has.

    A network has few shapes and asks for each in every step, so plans are remembered: the search
    takes up to 300 us, a call of the op 50.
    """
    group_channels = channels // num_groups
    divisors = [k for k in range(1, num_groups + 1) if num_groups % k == 0]

    def waste(groups: int) -> float:
        if not channels_last or groups == num_groups:  # what a tile reads is contiguous
            return 1.0
        return _sector_waste(groups * group_channels * itemsize)

    padded = triton.next_power_of_2(pixels)
    sizes = {k: triton.next_power_of_2(k * group_channels) * padded for k in divisors}
    limit = min(max_blocks, max(1, padded * itemsize // SECTOR_BYTES))
    # Where elements cannot be held in pairs, on sm_100, fewer pieces spill less.
    held_as = arrays, itemsize, channels_last, plain or (arrays == 2 and not pairs)
    backward_channels = channels_last and arrays > 1
    pairs &= itemsize == 2 and (group_channels if channels_last else pixels) % 2 == 0
    pairs &= not backward_channels
    choices = []
    for packed in (False, True)[: 1 + pairs]:
        for blocks in (1 << k for k in range(limit.bit_length())):
            if packed and blocks > 1 and not plain:
                continue
            crowded = blocks > 1 or (max_blocks > 1 and itemsize == 4 and not plain)
            registers = HELD_CROWDED if backward_channels and crowded else HELD
            held = registers // arrays * blocks * (1 + packed)
            if blocks > 1:
                held = min(held, CLUSTER_CHANNELS * padded)  # elements
            # A large tile is cut into pieces of at least 8 pixels.
            most = max(1, padded // blocks // 8)
            fitting = [
                k
                for k in divisors
                if sizes[k] <= held and _pieces(sizes[k] // blocks, *held_as) <= most
            ]
            # The fewest groups, so the most programs, among those that waste nothing; else the
            # least. And enough for 16 bytes a thread.
            groups = min(
                fitting,
                key=lambda k: (max(waste(k), WASTE), sizes[k] * itemsize < WARP_BYTES, k),
                default=0,
            )
            # A second read costs half as much again.
            if groups and waste(groups) < 1.5:
                choices.append((max(waste(groups), WASTE), packed, blocks, groups))
    if choices:
        _, packed, blocks, groups = min(choices)
        # A cluster that is needed anyway may as well fill a device at batch 1.
        while 1 < blocks < limit and num_groups // groups * blocks < DEVICE_PROGRAMS:
            blocks *= 2
        tile, size = sizes[groups] // padded, sizes[groups] // blocks
        pieces = _pieces(size, *held_as)
        if not plain and channels_last and packed:
            pieces *= 2
        return Plan(True, groups, tile, padded // blocks, 1, _warps(size), blocks, pieces, packed)

    groups = 1
    if channels_last:
        wide = [k for k in divisors if k * group_channels * itemsize >= SPLIT_WIDTH_BYTES]
        narrow = [k for k in wide if k * group_channels <= SPLIT_ELEMENTS // 16] or divisors[:1]
        groups = min(narrow, key=lambda k: (max(waste(k), WASTE), k))
        tile = min(triton.next_power_of_2(groups * group_channels), SPLIT_ELEMENTS // 16)
        tile_pixels = min(padded, SPLIT_ELEMENTS // tile)
    else:
        tile_pixels = min(padded, SPLIT_ELEMENTS)
        tile = min(triton.next_power_of_2(group_channels), SPLIT_ELEMENTS // tile_pixels)
    tiles = _launch.cdiv(pixels, tile_pixels) * _launch.cdiv(channels, tile)
    rounds = max(1, triton.next_power_of_2(tiles // REDUCTION_PROGRAMS + 1) // 2)
    return Plan(False, groups, tile, tile_pixels, rounds, 8)


def samples_per_program(
    cut: Plan, batch: int, channels: int, num_groups: int, pixels: int, itemsize: int
) -> int:
    """Samples that a program of the backward pass handles one after the other.

    A program writes its shares in the gradients of weight and bias, which are read again: 16 bytes
    per channel. So the number of samples is doubled until that is at most a 24th of x, grad and
    grad_x. It must divide the batch and leave enough programs: enough to fill a device, or to have
    4 KB each. It is at most four, because the loop over samples is unrolled.
    """
    samples, size = 1, pixels * itemsize
    enough = min(DEVICE_PROGRAMS, max(1, batch * channels * size >> 12))
    tiles = batch * cut.channel_tiles(channels, num_groups)
    while (
        cut.one_pass
        and samples < 4
        and samples * 3 * size < 24 * 16
        and batch % (2 * samples) == 0
        and tiles // (2 * samples) >= enough
    ):
        samples *= 2
    return samples


def _warps(elements: int) -> int:
    """16 elements a thread up to 16 warps."""
    return min(16, max(1, elements // 512))


def _pieces(elements: int, arrays: int, itemsize: int, channels_last: bool, plain: bool) -> int:
    """Pieces that a block's tile is cut into, for the fewest registers per thread.

    One piece is float32 at a time, next to everything that is held. Up to 32 elements a thread are
    one piece; of two arrays 16, or 32 bfloat16 in channels_last; with dropout or a residual 16.
    More are worked on 16 at a time.
    """
    per_thread = elements // (32 * _warps(elements))
    at_once = 32 if plain and (arrays == 1 or (channels_last and itemsize == 2)) else 16
    return 1 if per_thread <= at_once else per_thread * arrays // 16
