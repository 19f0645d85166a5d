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
    """Peak rates: bytes and FP32 operations (two per lane and clock) per second."""

    name: str
    bandwidth: float
    fp32: float
    multiprocessors: int

    @property
    def instructions(self) -> float:
        """Thread instructions per second, one per FP32 lane and clock."""
        return self.fp32 / 2


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (per GPU). Multiprocessors from
# the architecture white papers; that of B200 is what its devices report.
GPUS = (
    Gpu("A100", 2.039e12, 19.5e12, 108),
    Gpu("H100", 3.35e12, 67e12, 132),
    Gpu("H200", 4.8e12, 67e12, 132),
    Gpu("B200", 8.0e12, 75e12, 148),
)


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
