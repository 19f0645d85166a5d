"""Reference of `posterior_mean`: the mean of q(x_{t-1} | x_t, x0) (DDPM eq. 7, Math §4)."""

from __future__ import annotations

from torch import Tensor

from fastdiff.reference.q_sample import q_sample


def posterior_mean(x0: Tensor, x_t: Tensor, t: Tensor, coef_x0: Tensor, coef_x_t: Tensor) -> Tensor:
    """See `fastdiff.ops.posterior_mean`: the linear combination of `q_sample`, with other tables.

    Computes in float32 (float64 if x0, x_t or a table is), rounded once to x_t's dtype.
    """
    return q_sample(x0, t, coef_x0, coef_x_t, x_t, dtype=x_t.dtype)
