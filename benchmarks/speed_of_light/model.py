"""The limits of a kernel launch on a device, from counts: predictions, never measurements.

A launch takes at least the longest of

memory     its bytes at `REACH` of the bandwidth; what the L2 cache still holds does not count
L2         all bytes that miss the L1 cache, at 32 bytes per multiprocessor and clock
issue      its warp instructions at one per scheduler and clock, or as few as the resident warps
           can issue between dependences
a pipe     its instructions for that pipe at the pipe's throughput
in flight  its loads at the rate that the bytes under way allow (Little's law)
chain      ceil(waves) times what one block does in series: waiting for loads, its own
           instructions, barriers

over the share of the device that the grid fills, plus one launch. The limit that the largest of
these names is the predicted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.audit.executed import Launch
from benchmarks.audit.expansion import ISSUE
from benchmarks.roofline import Gpu

# Of the data sheet's bandwidth, the best streaming kernels.
REACH = 0.9
# Of a pipe's throughput and of the issue slots, with enough warps.
BUSY = 0.85
# Instructions that one warp issues per clock: it waits for its own results in between.
WARP_IPC = 0.33
# Between kernels of one stream that are launched ahead of time or replayed in a graph.
LAUNCH_SECONDS = 2e-6
# A barrier of all warps: waiting for the slowest of them, and its own latency.
BARRIER_SECONDS = 50e-9
# Of the L2 cache, what a kernel finds again.
L2_SHARE = 0.5
L2_BYTES_PER_CLOCK = 32
_REGISTERS = 65536
_REGISTER_UNIT = 256  # registers are handed out to a warp in this granularity
_SCHEDULERS = 4


def pipe_rates(gpu: Gpu) -> dict[str, float]:
    """Warp instructions per multiprocessor and clock (CUDA C++ Programming Guide, "Throughput of
    Native Arithmetic Instructions"); lsu: passes of 128 bytes."""
    return {"fma": gpu.lanes / 32, "imad": 2.0, "alu": 2.0, "xu": 0.5, "lsu": 1.0}


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that one multiprocessor holds, and what limits them."""

    blocks: int
    warps: int
    limit: str


def occupancy(gpu: Gpu, threads: int, registers: int, shared: int) -> Occupancy:
    """As cudaOccupancyMaxActiveBlocksPerMultiprocessor has it; 0 blocks: it cannot run."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    # Each scheduler has a quarter of the registers.
    by_registers = _REGISTERS // _SCHEDULERS // per_warp * _SCHEDULERS // warps
    limits = {
        "registers": by_registers,
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
    }
    if shared + gpu.reserved_shared:
        limits["shared memory"] = gpu.shared_bytes // (shared + gpu.reserved_shared)
    name = min(limits, key=lambda n: limits[n])
    return Occupancy(limits[name], limits[name] * warps, name)


@dataclass(frozen=True)
class Prediction:
    """Of one launch. `limits`: seconds; `fill`: share of the device's time that has a block."""

    occupancy: Occupancy
    waves: float
    fill: float
    in_flight: float
    needed: float
    issue_share: float
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def seconds(self) -> float:
        return LAUNCH_SECONDS + max(self.limits.values())


def dram_bytes(launch: Launch, gpu: Gpu, resident: float, cached: bool) -> float:
    """Bytes that go to memory: without those that the L2 cache still has.

    A block that reads its data again finds them there if the data of all resident blocks fit;
    `cached`: an earlier launch of the call left all of the launch's data there.
    """
    read = launch.read
    if cached:
        return launch.moved - read
    if launch.block_loads and resident * launch.block_unique < L2_SHARE * gpu.l2_bytes:
        read *= min(1.0, launch.block_unique / launch.block_loads)
    return launch.moved - launch.read + read


def predict(launch: Launch, gpu: Gpu, cached: bool = False) -> Prediction:
    """The limits of one launch."""
    held = occupancy(gpu, launch.threads, launch.registers, launch.shared)
    if not held.blocks:
        raise ValueError(f"{launch.kernel} does not fit a multiprocessor of {gpu.name}")
    processors = min(gpu.multiprocessors, launch.blocks)
    waves = launch.blocks / (gpu.multiprocessors * held.blocks)
    # The busiest multiprocessor runs this many blocks, and so many at a time.
    most = math.ceil(launch.blocks / gpu.multiprocessors)
    fill = launch.blocks / (gpu.multiprocessors * most)
    at_once = min(held.blocks, most)
    warps = at_once * -(-launch.threads // 32)
    share = gpu.multiprocessors * fill  # multiprocessors busy all the time

    resident = min(launch.blocks, gpu.multiprocessors * held.blocks)
    memory = dram_bytes(launch, gpu, resident, cached)
    limits = {"memory": memory / (gpu.bandwidth * REACH)}
    limits["L2"] = launch.moved / (share * L2_BYTES_PER_CLOCK * gpu.clock)

    executed = launch.executed
    per_clock = min(BUSY * _SCHEDULERS, warps * WARP_IPC)
    limits["issue"] = executed[ISSUE] / (share * per_clock * gpu.clock)
    rates = pipe_rates(gpu)
    spent = {name: executed.get(name, 0.0) / rate for name, rate in rates.items()}
    spent["fma"] += spent.pop("imad")  # one pipe
    for name, clocks in spent.items():
        limits[name] = clocks / (BUSY * share * gpu.clock)

    # Bytes under way: of asynchronous copies all that a block reads, else what its threads ask for.
    of_block = launch.block_loads
    if not launch.copies:
        of_block = min(of_block, launch.threads * launch.in_flight)
    in_flight = at_once * of_block
    needed = gpu.bandwidth * REACH * gpu.latency / gpu.multiprocessors
    reads = launch.block_loads * launch.blocks
    latency = gpu.latency if not cached else gpu.latency / 2
    if in_flight:
        limits["in flight"] = reads / (processors * fill_of(launch, gpu) * in_flight) * latency

    batches = launch.block_loads / of_block if of_block else 0.0
    own = executed[ISSUE] / launch.blocks / -(-launch.threads // 32) / (WARP_IPC * gpu.clock)
    block = latency * batches + own + launch.barriers * BARRIER_SECONDS
    limits["chain"] = math.ceil(waves) * block if waves > 1 else block
    issue_slots = share * _SCHEDULERS * gpu.clock
    bytes_time = launch.moved / gpu.bandwidth
    return Prediction(
        held,
        waves,
        fill,
        in_flight,
        needed,
        executed[ISSUE] / issue_slots / bytes_time if bytes_time else 0.0,
        limits,
    )


def fill_of(launch: Launch, gpu: Gpu) -> float:
    """Share of their time that the multiprocessors with a block are busy."""
    most = math.ceil(launch.blocks / gpu.multiprocessors)
    return launch.blocks / (min(gpu.multiprocessors, launch.blocks) * most)


def predict_call(launches: Sequence[Launch], gpu: Gpu) -> list[Prediction]:
    """Launches one after the other; a later one finds in L2 what fits there."""
    largest = max((launch.moved for launch in launches), default=0.0)
    fits = largest < L2_SHARE * gpu.l2_bytes
    return [predict(launch, gpu, cached=fits and n > 0) for n, launch in enumerate(launches)]
