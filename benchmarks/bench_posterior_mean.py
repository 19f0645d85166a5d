"""posterior_mean against a copy, eager PyTorch and torch.compile.

    python -m benchmarks.bench_posterior_mean [--device cpu] [--quick] [--json FILE]

GB/s counts the bytes a perfect kernel moves: read x0 and x_t, write the mean.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import fastdiff
from benchmarks import machine, op_table
from benchmarks.op_table import Goal, Spec
from fastdiff import ops

T = 1000
MODES = ("forward",)
GOALS = (Goal("out of cache: share of copy bandwidth", 0.8, MODES, True, op_table.of_copy),)


def eager(x0: Tensor, x_t: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What everybody writes. The tables are cast, else half-precision input would give float32."""
    shape = (-1, *[1] * (x0.dim() - 1))
    return a[t].to(x0.dtype).view(shape) * x0 + b[t].to(x0.dtype).view(shape) * x_t


def specify(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    mode: str,
    device: torch.device,
) -> Spec:
    """The tensors of one workload, and what a right result is."""
    generator = torch.Generator().manual_seed(0)
    x0, x_t = (
        torch.randn(shape, generator=generator).to(device, dtype, memory_format=memory_format)
        for _ in range(2)
    )
    t = torch.randint(T, shape[:1], generator=generator).to(device)
    tables = fastdiff.NoiseSchedule.linear(T).tables(device)
    a, b = tables.posterior_coef_x0, tables.posterior_coef_x_t
    arguments = (x0, x_t, t, a, b)
    exact = eager(x0.float(), x_t.float(), t, a, b)
    tolerance = 4 * torch.finfo(dtype).eps
    return Spec(
        lambda: ops.posterior_mean(*arguments),
        eager,
        arguments,
        exact,
        tolerance,
        3 * x0.nbytes,
        x0,
    )


def main(argv: list[str] | None = None) -> int:
    return op_table.main("bench_posterior_mean", __doc__, MODES, specify, GOALS, argv)


if __name__ == "__main__":
    machine.ensure_steady_allocator()
    sys.exit(main())
