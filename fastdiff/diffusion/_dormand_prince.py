"""An adaptive Runge-Kutta pair of orders 5 and 4, with a step size of its own for every sample.

Dormand & Prince 1980, "A family of embedded Runge-Kutta formulae", RK5(4)7M.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Slope k + 1 is taken at u + C[k] h, y + h sum_j A[k][j] slope_j; the last of these points is the
# fifth-order result, so that its slope is the first of the next step.
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# Fifth-order minus fourth-order weights.
_E = (
    71 / 57600,
    0.0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0


def integrate(
    slope: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    first_step: float,
    parts: tuple[int, ...],
    max_steps: int = 10_000,
    on_finish: Callable[[int], None] = lambda num: None,
) -> tuple[Tensor, Tensor]:
    """y(end) of dy/du = slope from y(start), for rows that know nothing of each other.

    Parameters
    ----------
    slope
        (u (R,), y (R, N), rows (R,)) -> dy/du (R, N) of the samples `rows`.
    y
        (B, N), float32 or float64.
    rtol, atol
        A step is accepted if in every part of y the root mean square of
        error / (atol + rtol |y|) is at most 1.
    first_step
        Tried first.
    parts
        Sizes of the parts of y, N in sum: a few numbers must not drown among many.
    max_steps
        Per sample, rejected ones included.
    on_finish
        Called with the number of samples that have just arrived.

    Returns
    -------
    tuple of Tensor
        y (B, N), and how often each sample's slope was taken, int64 (B,).

    Raises
    ------
    RuntimeError
        No step is small enough, or there are too many.
    """
    y, num = y.clone(), len(y)
    rows = torch.arange(num, device=y.device)
    u = torch.full((num,), start, dtype=y.dtype, device=y.device)
    h = torch.full_like(u, first_step)
    slopes = slope(u, y, rows)
    taken = torch.ones_like(rows)
    smallest = 4 * torch.finfo(y.dtype).eps * abs(end)
    for _ in range(max_steps):
        if not len(rows):
            return y, taken
        now, left, before = u[rows], end - u[rows], y[rows]
        # The last step ends where it should; one that would leave a crumb is halved.
        step = torch.where(h[rows] >= left, left, torch.minimum(h[rows], left / 2))
        k = [slopes[rows]]
        after = before
        for c, weights in zip(_C, _A, strict=True):
            after = before + step[:, None] * _combine(weights, k)
            k.append(slope(now + c * step, after, rows))
        taken[rows] += len(_C)
        scale = atol + rtol * torch.maximum(before.abs(), after.abs())
        error = (step[:, None] * _combine(_E, k) / scale).split(parts, dim=1)
        worst = torch.stack([e.square().mean(1).sqrt() for e in error]).amax(0)
        good = worst <= 1  # false for NaN
        factor = (_SAFETY * worst ** (-1 / 5)).clamp(_SHRINK, _GROW).nan_to_num(_SHRINK)
        h[rows] = step * factor
        stuck = ~good & (h[rows] < smallest)
        if bool(stuck.any()):
            raise RuntimeError(
                f"no step is small enough at {float(now[stuck][0]):.6g} of {end:.6g}, for "
                f"{int(stuck.sum())} of {num} samples: the model's output is not finite or not "
                "smooth there; loosen rtol and atol"
            )
        arrived = good & (step == left)
        u[rows] = torch.where(good, now + step, now)
        y[rows] = torch.where(good[:, None], after, before)
        slopes[rows] = torch.where(good[:, None], k[-1], k[0])
        if bool(arrived.any()):
            on_finish(int(arrived.sum()))
            rows = rows[~arrived]
    raise RuntimeError(f"more than {max_steps} steps; loosen rtol and atol")


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
