"""`posterior_mean`: the mean of q(x_{t-1} | x_t, x0), on the kernels of `q_sample`.

Both are a_t x + b_t y with coefficients from tables, so the formula exists once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff._backends import select_backend
from fastdiff.ops.q_sample import Arguments, _unsupported
from fastdiff.ops.q_sample import _op as _q_sample_op
from fastdiff.reference import checks


def posterior_mean(x0: Tensor, x_t: Tensor, t: Tensor, coef_x0: Tensor, coef_x_t: Tensor) -> Tensor:
    """mu~_t = coef_x0[t] x0 + coef_x_t[t] x_t (DDPM eq. 7, Math §4), in one pass.

    Arithmetic is float32 whatever the dtype of the tensors; the result is rounded once.

    Parameters
    ----------
    x0
        (B, ...), floating point, or uint8 levels, which are scaled to [-1, 1]; may be an estimate.
        Contiguous or channels_last; other strides work through a copy.
    x_t
        Same shape as x0, floating point.
    t
        (B,) int64, 0-based timesteps.
    coef_x0, coef_x_t
        (T,) float32 tables: `NoiseSchedule.tables(device).posterior_coef_x0` and
        `.posterior_coef_x_t` (float64 ones, and ones that require grad, run on the reference).

    Returns
    -------
    Tensor
        Shape and dtype of x_t, memory format of x0. Differentiable in x0, x_t and (on the
        reference) the tables, any number of times. Under autocast nothing is cast.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.
    IndexError
        t outside 0..T-1 on the CPU, and on CUDA under FASTDIFF_DEBUG=1 (without it such samples
        come out as NaN).

    Examples
    --------
    >>> import torch, fastdiff
    >>> tables = fastdiff.NoiseSchedule.linear(1000).tables("cpu")
    >>> x0, x_t, t = torch.zeros(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.arange(4)
    >>> mean = fastdiff.ops.posterior_mean(
    ...     x0, x_t, t, tables.posterior_coef_x0, tables.posterior_coef_x_t
    ... )
    """
    checks.check_tensor("posterior_mean", "x_t", x_t)
    if not x_t.dtype.is_floating_point:  # before its dtype is asked for as that of the result
        checks.check_float("posterior_mean", "x_t", x_t.dtype)
    arguments = (x0, t, coef_x0, coef_x_t, x_t, None, None, 0, None, x_t.dtype)
    try:
        unsupported = _unsupported(x0, coef_x0, coef_x_t, x_t, x_t.dtype)
        backend = select_backend("posterior_mean", x_t, unsupported)
    except AttributeError:  # not a tensor
        _check(Arguments(*arguments), check_range=False)
        raise
    return _op.call(backend, arguments, (x0, x_t))


def posterior_mean_variance(
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    coef_x0: Tensor,
    coef_x_t: Tensor,
    variance: Tensor,
    log_variance: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x0) (DDPM eqs. 6-7, Math §4).

    Parameters
    ----------
    x0, x_t, t, coef_x0, coef_x_t
        As in `posterior_mean`.
    variance, log_variance
        (T,) tables: `NoiseSchedule.tables(device).posterior_variance` and
        `.posterior_log_variance_clipped` (the entry at t = 0, where the variance is 0, is clipped).

    Returns
    -------
    tuple of Tensor
        The mean as from `posterior_mean`; the other two in the tables' dtype, shaped like x_t:
        views of one value per sample.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `posterior_mean`.

    Examples
    --------
    >>> import torch, fastdiff
    >>> tables = fastdiff.NoiseSchedule.linear(1000).tables("cpu")
    >>> x0, x_t, t = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8), torch.tensor([0, 999])
    >>> mean, variance, log_variance = fastdiff.ops.posterior_mean_variance(
    ...     x0,
    ...     x_t,
    ...     t,
    ...     tables.posterior_coef_x0,
    ...     tables.posterior_coef_x_t,
    ...     tables.posterior_variance,
    ...     tables.posterior_log_variance_clipped,
    ... )
    >>> variance[0].max().item()
    0.0
    """
    op = "posterior_mean_variance"
    checks.check_tensor(op, "x_t", x_t)
    num = checks.check_tables(
        op, x_t.device, coef_x0=coef_x0, variance=variance, log_variance=log_variance
    )
    mean = posterior_mean(x0, x_t, t, coef_x0, coef_x_t)
    valid, row = (t >= 0) & (t < num), t.clamp(0, num - 1)
    shape = (-1, *[1] * (x_t.dim() - 1))

    def per_sample(table: Tensor) -> Tensor:
        # NaN where t is outside the tables, as in the kernels.
        return torch.where(valid, table[row], torch.nan).view(shape).expand_as(x_t)

    return mean, per_sample(variance), per_sample(log_variance)


def _check(a: Arguments, *, check_range: bool) -> None:
    """The check of `q_sample`, in the words of `posterior_mean`."""
    op, x0, x_t = "posterior_mean", a.x0, a.noise
    checks.check_tensor(op, "x0", x0)
    if x0.dtype != torch.uint8:
        checks.check_float(op, "x0", x0.dtype, "uint8 or a floating-point dtype")
    if x0.dim() == 0:
        raise ValueError(f"{op}: x0 has shape (), expected (B, ...)")
    checks.check_like(op, "x_t", x_t, "x0", x0)
    num = checks.check_tables(
        op, x0.device, coef_x0=a.sqrt_alpha_bar, coef_x_t=a.sqrt_one_minus_alpha_bar
    )
    checks.check_per_sample(op, "t", a.t, torch.int64, x0.shape[0], x0.device)
    if check_range:
        checks.check_timestep_range(op, a.t, num)


_op = _q_sample_op._replace(check=_check)
