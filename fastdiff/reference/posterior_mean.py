"""Reference of `posterior_mean`: the mean of q(x_{t-1} | x_t, x0) (DDPM eq. 7, SPEC §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.reference.q_sample import per_sample


def posterior_mean(x0: Tensor, x_t: Tensor, t: Tensor, coef_x0: Tensor, coef_x_t: Tensor) -> Tensor:
    """mu~_t = coef_x0[t] x0 + coef_x_t[t] x_t (DDPM eq. 7, SPEC §4).

    Parameters
    ----------
    x0, x_t
        (B, ...), floating point; x0 may be an estimate.
    t
        (B,) int64, 0-based timesteps.
    coef_x0, coef_x_t
        (T,) tables: `NoiseSchedule.tables(device).posterior_coef_x0` and `.posterior_coef_x_t`.

    Returns
    -------
    Tensor
        Shape and dtype of x_t. Computed in float32 (float64 if x_t or a table is), rounded once.
    """
    if x0.shape != x_t.shape:
        raise ValueError(
            f"posterior_mean: x0 has shape {tuple(x0.shape)}, expected {tuple(x_t.shape)} as x_t"
        )
    wide = torch.float64 in (x0.dtype, x_t.dtype, coef_x0.dtype)
    compute = torch.float64 if wide else torch.float32
    x0, x = x0.to(compute), x_t.to(compute)
    return (per_sample(coef_x0, t, x) * x0 + per_sample(coef_x_t, t, x) * x).to(x_t.dtype)
