"""The row of coefficients that one sampler step needs, and the formulas every step shares.

A step kernel gets a float32 table (S, K) and reads one row per sample. The rows are built in
float64 by `fastdiff.diffusion.step_tables`; here is what the columns are and how they are used.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from fastdiff.reference import checks

PREDICTIONS = ("eps", "x0", "v", "mean")


class StepColumn(IntEnum):
    """Columns of a step table; the C++, CUDA and Triton kernels use the same numbers.

    a = sqrt(abar_t), s = sqrt(1 - abar_t); c0 and c1 are the posterior mean's coefficients of x0
    and x_t for one step of the full process (what a network that predicts "mean" was trained on).
    One update covers DDPM, DDIM, DDIM encoding and the probability-flow Euler step, z ~ N(0, I):

        x_s = COEF_X0 x0 + COEF_X_T x_t + COEF_EPS eps
              + SIGMA exp(LOG_VARIANCE_SLOPE v / 2) z,

    with v the network's variance channels (slope 0: none). A row is 16 floats, 64 aligned bytes.
    """

    SQRT_ALPHA_BAR = 0
    """a. v-prediction: x0 = a x_t - s v."""
    SQRT_ONE_MINUS_ALPHA_BAR = 1
    """s. v-prediction: eps = s x_t + a v."""
    RECIP_SQRT_ALPHA_BAR = 2
    """1 / a. eps-prediction: x0 = x_t / a - (s / a) eps. Infinite at zero terminal SNR."""
    NOISE_TO_SIGNAL = 3
    """s / a. Infinite at zero terminal SNR."""
    RECIP_SQRT_ONE_MINUS_ALPHA_BAR = 4
    """1 / s. eps = x_t / s - (a / s) x0."""
    SIGNAL_TO_NOISE = 5
    """a / s."""
    X0_FROM_MEAN = 6
    """1 / c0. mean-prediction: x0 = mean / c0 - (c1 / c0) x_t."""
    X0_FROM_MEAN_X_T = 7
    """c1 / c0."""
    COEF_X0 = 8
    COEF_X_T = 9
    COEF_EPS = 10
    SIGMA = 11
    """Noise scale; 0 in the row that ends at t = 0."""
    COEF_EXTRA = 11
    """The same column where a sampler passes another state in place of the noise."""
    LOG_VARIANCE = 12
    """Log variance of p(x_s | x_t) where the network's variance channels are 0 (DDPM tables)."""
    LOG_VARIANCE_SLOPE = 13
    """Its increase per unit of the variance channels; 0 for fixed variances."""
    POSTERIOR_LOG_VARIANCE = 14
    """Clipped log variance of q(x_s | x_t, x0) (DDPM tables; the bound needs it)."""
    TIMESTEP = 15
    """The index t the network is fed, for readers of the table; exact below 2**24."""


NUM_STEP_COLUMNS = len(StepColumn)


class StepRows:
    """One table row per sample, as columns that broadcast against images.

    Parameters
    ----------
    table
        (S, K) step table.
    step
        (B,) int64 row of each sample.
    like
        The tensor whose rank and dtype the columns are for: they are float32, or float64 with it.
    """

    def __init__(self, table: Tensor, step: Tensor, like: Tensor) -> None:
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._rows = table[step].to(self.dtype)
        self._shape = (-1, *[1] * (like.dim() - 1))

    def __getitem__(self, column: StepColumn) -> Tensor:
        return self._rows[:, column].reshape(self._shape)


def check_step(
    op: str,
    x_t: Tensor,
    model_output: Tensor,
    step: Tensor,
    table: Tensor,
    prediction: str,
    uncond: Tensor | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    channels: tuple[int, ...],
) -> None:
    """Raise on arguments that `ddpm_step` and `ddim_step` cannot take.

    `channels` are the numbers of channels that model_output may have.
    """
    checks.check_name(op, "prediction", prediction, PREDICTIONS)
    if x_t.dim() < 2 or not x_t.is_floating_point():
        raise ValueError(
            f"{op}: x_t has shape {tuple(x_t.shape)} and dtype {x_t.dtype}, expected (B, C, ...) "
            "of a floating-point dtype"
        )
    allowed = [(x_t.shape[0], c, *x_t.shape[2:]) for c in channels]
    for name, tensor in (("model_output", model_output), ("uncond", uncond)):
        if tensor is not None and tuple(tensor.shape) not in allowed:
            expected = " or ".join(map(str, dict.fromkeys(allowed)))
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
    if table.dim() != 2 or table.shape[1] != NUM_STEP_COLUMNS:
        raise ValueError(
            f"{op}: table has shape {tuple(table.shape)}, expected (S, {NUM_STEP_COLUMNS}) from "
            "NoiseSchedule.ddim_table or ddpm_table"
        )
    if step.dtype != torch.int64 or tuple(step.shape) != (x_t.shape[0],):
        raise ValueError(
            f"{op}: step has shape {tuple(step.shape)} and dtype {step.dtype}, expected "
            f"({x_t.shape[0]},) int64, one table row per sample"
        )
    if noise is not None and seed is not None:
        raise ValueError(f"{op}: pass either noise or seed; both were given")
    if noise is not None and noise.shape != x_t.shape:
        raise ValueError(
            f"{op}: noise has shape {tuple(noise.shape)}, expected {tuple(x_t.shape)} as x_t"
        )


def guide(cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """uncond + guidance_scale (cond - uncond) (CFG eq. 6, Math §7), or cond alone.

    Every parameterization is affine in eps with the same x_t term in both outputs, so combining
    raw outputs equals combining eps.
    """
    return cond if uncond is None else uncond + guidance_scale * (cond - uncond)


def predict_x0(prediction: str, x_t: Tensor, output: Tensor, row: StepRows) -> Tensor:
    """x0 from the network's output (Math §5)."""
    c = StepColumn
    if prediction == "eps":
        return row[c.RECIP_SQRT_ALPHA_BAR] * x_t - row[c.NOISE_TO_SIGNAL] * output
    if prediction == "v":
        return row[c.SQRT_ALPHA_BAR] * x_t - row[c.SQRT_ONE_MINUS_ALPHA_BAR] * output
    if prediction == "mean":
        return row[c.X0_FROM_MEAN] * output - row[c.X0_FROM_MEAN_X_T] * x_t
    return output


def eps_from_x0(x_t: Tensor, x0: Tensor, row: StepRows) -> Tensor:
    """eps = (x_t - a x0) / s (Math §5)."""
    c = StepColumn
    return row[c.RECIP_SQRT_ONE_MINUS_ALPHA_BAR] * x_t - row[c.SIGNAL_TO_NOISE] * x0


def predict_eps(prediction: str, x_t: Tensor, output: Tensor, x0: Tensor, row: StepRows) -> Tensor:
    """eps from the network's output, and from the unclipped x0 where that is the only way."""
    c = StepColumn
    if prediction == "eps":
        return output
    if prediction == "v":
        return row[c.SQRT_ONE_MINUS_ALPHA_BAR] * x_t + row[c.SQRT_ALPHA_BAR] * output
    return eps_from_x0(x_t, x0, row)
