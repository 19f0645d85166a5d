"""What `vlb_terms` and its backward operator refuse, with the clear messages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops import _checks
from fastdiff.reference.step_table import NUM_STEP_COLUMNS, PREDICTIONS


def check(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    prediction: int,
    learned: bool,
    clip: bool,
    detach_mean: bool,
    *,
    check_range: bool,
) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    op = "vlb_terms"
    named = {"x0": x0, "x_t": x_t, "model_output": model_output, "t": t, "table": table}
    for name, x in named.items():
        _checks.check_tensor(op, name, x)
    _checks.check_sources(op, noise=noise, keys=keys, seed=seed)
    _checks.check_position(op, "prediction", prediction, PREDICTIONS)
    _checks.check_flags(op, learned=learned, clip=clip, detach_mean=detach_mean)
    _checks.check_float(op, "x_t", x_t.dtype)
    if x_t.dim() < 2:
        raise ValueError(f"{op}: x_t has shape {tuple(x_t.shape)}, expected (B, C, ...)")
    _checks.check_like(op, "x0", x0, "x_t", x_t)
    _checks.check_float(op, "model_output", model_output.dtype)
    batch, channels, *rest = x_t.shape
    expected = (batch, 2 * channels if learned else channels, *rest)
    if tuple(model_output.shape) != expected:
        kind = "with" if learned else "without"
        raise ValueError(
            f"{op}: model_output has shape {tuple(model_output.shape)}, expected {expected}, "
            f"{kind} variance channels, for x_t of shape {tuple(x_t.shape)}"
        )
    _checks.check_device(op, "model_output", model_output.device, x_t.device)
    if noise is not None:
        _checks.check_like(op, "noise", noise, "x_t", x_t)
    if keys is not None:
        _checks.check_per_sample(op, "seed", keys, torch.int64, batch, x_t.device)
    if table.dim() != 2 or table.shape[1] != NUM_STEP_COLUMNS:
        raise ValueError(
            f"{op}: table has shape {tuple(table.shape)}, expected (T, {NUM_STEP_COLUMNS}) from "
            "NoiseSchedule.ddpm_table"
        )
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: table has dtype {table.dtype}, expected torch.float32")
    _checks.check_device(op, "table", table.device, x_t.device)
    _checks.check_per_sample(op, "t", t, torch.int64, batch, x_t.device)
    if check_range:
        _checks.check_timestep_range(op, t, table.shape[0])


def check_backward(grad: Tensor, *arguments: object, check_range: bool) -> None:
    check(*arguments, check_range=check_range)
    x_t = arguments[1]
    shape = (3, x_t.shape[0])
    _checks.check_operand("vlb_terms", "grad", grad, shape, "that of the terms", x_t.device)
