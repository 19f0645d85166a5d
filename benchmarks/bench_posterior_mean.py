"""posterior_mean against a copy, eager PyTorch and torch.compile.

GB/s counts the bytes a perfect kernel moves: read x0 and x_t, write the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastdiff
from benchmarks.op_table import Case, Op, Spec, spec_workload
from fastdiff import ops

T = 1000
MODES = ("forward",)


def eager(x0: Tensor, x_t: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What everybody writes. The tables are cast, else half-precision input would give float32."""
    shape = (-1, *[1] * (x0.dim() - 1))
    return a[t].to(x0.dtype).view(shape) * x0 + b[t].to(x0.dtype).view(shape) * x_t


def specify(case: Case) -> Spec:
    """The tensors of one workload, and what a right result is."""
    shape, dtype, memory_format, device = case.shape, case.dtype, case.memory_format, case.device
    generator = torch.Generator().manual_seed(0)
    x0, x_t = (
        torch.randn(shape, generator=generator).to(device, dtype, memory_format=memory_format)
        for _ in range(2)
    )
    t = torch.randint(T, shape[:1], generator=generator).to(device)
    tables = fastdiff.NoiseSchedule.linear(T).tables(device)
    a, b = tables.posterior_coef_x0, tables.posterior_coef_x_t
    arguments = (x0, x_t, t, a, b)
    exact = eager(x0.double(), x_t.double(), t, a, b)
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


OP = Op("posterior_mean", MODES, spec_workload(specify), tiny_modes=MODES)
