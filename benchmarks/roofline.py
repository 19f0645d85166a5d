"""A roofline of named GPUs, and what eager PyTorch's kernels move: for predictions, not results.

A launch takes `launch_seconds`, plus the longer of its bytes at the data sheet's bandwidth and its
instructions at one per FP32 lane and clock. A grid with fewer blocks than the device has
multiprocessors reaches that share of the bandwidth. Nothing is said about caches: tensors that fit
L2 are faster than this, on both sides of a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# An assumption: between dependent kernels of one stream, launched ahead of time. Eager code that
# the CPU cannot launch as fast pays more, which is not counted.
LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Gpu:
    """Peak rates, and the limits of one multiprocessor.

    Attributes
    ----------
    bandwidth, fp32
        Bytes and FP32 operations (two per lane and clock) per second.
    lanes
        FP32 operations that a multiprocessor starts per clock; from these, the clock.
    latency
        Seconds from a load to its data when memory is busy.
    l2_bytes
        The last cache.
    warps, blocks, shared_bytes, reserved_shared, cluster
        That one multiprocessor holds; shared memory that each block takes besides its own; blocks
        per cluster, at most.
    """

    name: str
    bandwidth: float
    fp32: float
    multiprocessors: int
    arch: str = "sm_90"
    lanes: int = 128
    latency: float = 700e-9
    l2_bytes: int = 50 << 20
    warps: int = 64
    blocks: int = 32
    shared_bytes: int = 228 << 10
    reserved_shared: int = 1 << 10
    cluster: int = 1

    @property
    def instructions(self) -> float:
        """Thread instructions per second, one per FP32 lane and clock."""
        return self.fp32 / 2

    @property
    def clock(self) -> float:
        """Hertz, of the peak rates."""
        return self.fp32 / (2 * self.lanes * self.multiprocessors)


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (per GPU), GeForce RTX 4090, T4.
# Multiprocessors and L2 from the architecture white papers; those of B200 are what its devices
# report. Limits of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities". Latencies
# are assumptions: 1.5 to 3 times those of an idle device (Luo et al. 2024, arXiv 2402.13499).
DEVICES = (
    Gpu("A100", 2.039e12, 19.5e12, 108, "sm_80", 64, 600e-9, 40 << 20, shared_bytes=164 << 10),
    Gpu("H100", 3.35e12, 67e12, 132, cluster=16),
    Gpu("H200", 4.8e12, 67e12, 132, cluster=16),
    Gpu("B200", 8.0e12, 75e12, 148, "sm_100", 128, 800e-9, 126 << 20, cluster=16),
    Gpu(
        *("RTX 4090", 1.008e12, 82.6e12, 128, "sm_89", 128, 600e-9, 72 << 20),
        warps=48,
        blocks=24,
        shared_bytes=100 << 10,
    ),
    Gpu(
        *("T4", 0.32e12, 8.1e12, 40, "sm_75", 64, 600e-9, 4 << 20),
        warps=32,
        blocks=16,
        shared_bytes=64 << 10,
        reserved_shared=0,
    ),
)
GPUS = DEVICES[:4]


@dataclass(frozen=True)
class Cost:
    """One launch. `blocks` None: as many as the device wants."""

    bytes: float
    instructions: float = 0.0
    blocks: int | None = None


def seconds(launches: Iterable[Cost], gpu: Gpu, launch_seconds: float = LAUNCH_SECONDS) -> float:
    """Predicted time of launches one after the other."""
    total = 0.0
    for cost in launches:
        share = 1.0
        if cost.blocks is not None:
            share = min(1.0, cost.blocks / gpu.multiprocessors)
        work = max(cost.bytes / gpu.bandwidth, cost.instructions / gpu.instructions)
        total += launch_seconds + work / share
    return total


# Operators that are several kernels on CUDA: how many, and the bytes that they move beyond inputs
# and outputs. aten/src/ATen/native/cuda/group_norm_kernel.cu: moments, fused coefficients, apply;
# internal gradients, fused coefficients, dx, dweight and dbias. Loss.cpp: the square, its mean.
_KERNELS: dict[str, tuple[int, Callable[[list[Tensor]], int]]] = {
    "native_group_norm": (3, lambda inputs: inputs[0].nbytes),
    "native_group_norm_backward": (4, lambda inputs: inputs[0].nbytes + inputs[1].nbytes),
    "mse_loss": (2, lambda inputs: 2 * inputs[0].nbytes),
}
_NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "detach", "alias", "_reshape_alias", "scalar")


def _stored_bytes(x: Tensor) -> int:
    """What reading it touches: an expanded dimension is stored once."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else 1
    return size


class _Counter(TorchDispatchMode):
    """Notes each operator as kernels that read their inputs and write their outputs once."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Cost] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(_NO_KERNEL):
            return result
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        kernels, extra = _KERNELS.get(name, (1, lambda _: 0))
        distinct = {id(x): x for x in inputs}.values()
        moved = sum(map(_stored_bytes, distinct)) + sum(x.nbytes for x in outputs)
        if name.startswith(("index", "embedding")):  # reads the rows that it takes
            moved = 2 * sum(x.nbytes for x in outputs)
        if name in ("zeros_like", "ones_like", "full_like", "randn_like", "rand_like"):
            moved = sum(x.nbytes for x in outputs)
        moved += extra(inputs)
        self.launches += [Cost(moved / kernels)] * kernels
        return result


def eager_launches(function: Callable[..., Any], *arguments: Any) -> list[Cost]:
    """The kernels of `function`, run on the meta device: no memory, no arithmetic.

    Inputs that require gradients stay so; what `function` differentiates is counted too.
    """

    def meta(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return moved.requires_grad_(x.requires_grad)

    moved = [meta(x) for x in arguments]
    with _Counter() as counter:
        function(*moved)
    return counter.launches
