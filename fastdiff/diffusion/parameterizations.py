"""What a network predicts, and how one prediction becomes another (Math §5).

Every quantity is affine in any other given x_t: target = A_t x_t + B_t source. The pairs below are
written so that no coefficient cancels, evaluated in float64 and used in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff._types import check_name, check_tensors
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.q_sample import per_sample
from fastdiff.reference.step_columns import PREDICTIONS

QUANTITIES = (*PREDICTIONS, "score")
"""What `convert` knows: eps, x0, v, the posterior mean, and the score grad log q(x_t)."""


@dataclass(frozen=True)
class _Symbols:
    """alpha, sigma and the like at every t, float64 (T,)."""

    a: Tensor  # sqrt(abar)
    s: Tensor  # sqrt(1 - abar)
    beta: Tensor
    root_alpha: Tensor  # sqrt(alpha)
    c0: Tensor  # posterior mean's coefficient of x0
    c1: Tensor  # and of x_t
    zero: Tensor
    one: Tensor


# (source, target) -> (A, B). From mean: c0 x0 + c1 x_t and DDPM eq. 11, solved for x0 and eps.
_PAIRS: dict[tuple[str, str], Callable[[_Symbols], tuple[Tensor, Tensor]]] = {
    ("eps", "x0"): lambda k: (1 / k.a, -k.s / k.a),
    ("eps", "v"): lambda k: (-k.s / k.a, 1 / k.a),
    ("eps", "mean"): lambda k: (1 / k.root_alpha, -k.beta / (k.s * k.root_alpha)),
    ("eps", "score"): lambda k: (k.zero, -1 / k.s),
    ("x0", "eps"): lambda k: (1 / k.s, -k.a / k.s),
    ("x0", "v"): lambda k: (k.a / k.s, -1 / k.s),
    ("x0", "mean"): lambda k: (k.c1, k.c0),
    ("x0", "score"): lambda k: (-1 / k.s**2, k.a / k.s**2),
    ("v", "eps"): lambda k: (k.s, k.a),
    ("v", "x0"): lambda k: (k.a, -k.s),
    ("v", "mean"): lambda k: (k.c0 * k.a + k.c1, -k.c0 * k.s),
    ("v", "score"): lambda k: (-k.one, -k.a / k.s),
    ("mean", "eps"): lambda k: (k.s / k.beta, -k.s * k.root_alpha / k.beta),
    ("mean", "x0"): lambda k: (-k.c1 / k.c0, 1 / k.c0),
    ("mean", "v"): lambda k: (k.a / k.s + k.c1 / (k.c0 * k.s), -1 / (k.c0 * k.s)),
    ("mean", "score"): lambda k: (-1 / k.beta, k.root_alpha / k.beta),
    ("score", "eps"): lambda k: (k.zero, -k.s),
    ("score", "x0"): lambda k: (1 / k.a, k.s**2 / k.a),
    ("score", "v"): lambda k: (-k.s / k.a, -k.s / k.a),
    ("score", "mean"): lambda k: (1 / k.root_alpha, k.beta / k.root_alpha),
}


def conversion(schedule: NoiseSchedule, source: str, target: str) -> tuple[Tensor, Tensor]:
    """A, B of target = A_t x_t + B_t source, float64 (T,) (Math §5).

    Raises
    ------
    ValueError
        Unknown quantity; or a source of eps or score on a schedule with zero terminal SNR, where
        x_T = eps whatever x0 is, so that only x0, v or the mean can tell the rest.
    """
    for name, value in (("source", source), ("target", target)):
        check_name(name, value, QUANTITIES)
    if source == target:
        return torch.zeros_like(schedule.betas), torch.ones_like(schedule.betas)
    noisy = ("eps", "score")
    if source in noisy and target not in noisy and schedule.has_zero_terminal_snr:
        raise ValueError(
            f"{source} does not determine {target} at zero terminal SNR (abar_T = 0); predict x0 "
            "or v, or leave the last timestep out with schedule.respace(range(T - 1))"
        )
    symbols = _Symbols(
        a=schedule.sqrt_alpha_bars,
        s=schedule.sqrt_one_minus_alpha_bars,
        beta=schedule.betas,
        root_alpha=schedule.alphas.sqrt(),
        c0=schedule.posterior_mean_coef_x0,
        c1=schedule.posterior_mean_coef_x_t,
        zero=torch.zeros_like(schedule.betas),
        one=torch.ones_like(schedule.betas),
    )
    return _PAIRS[source, target](symbols)


def convert(
    schedule: NoiseSchedule, source: str, target: str, value: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """The `target` that a `source` of `value` implies at x_t (Math §5).

    eps, x0, v = sqrt(abar) eps - sqrt(1-abar) x0, the posterior mean mu~, and the score
    -eps / sqrt(1-abar) determine each other given x_t.

    Parameters
    ----------
    source, target
        "eps", "x0", "v", "mean" or "score".
    value, x_t
        (B, ...), floating point.
    t
        (B,) int64, 0-based timesteps.

    Returns
    -------
    Tensor
        Shape and dtype of `value`; float32 arithmetic (float64 for float64 tensors).

    Raises
    ------
    ValueError
        Unknown quantity, shapes that differ, or a conversion that zero terminal SNR rules out.

    Examples
    --------
    >>> import torch, fastdiff
    >>> schedule = fastdiff.NoiseSchedule.cosine(1000)
    >>> x_t, eps, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    >>> v = fastdiff.parameterizations.convert(schedule, "eps", "v", eps, x_t, t)
    """
    check_tensors("convert", value=value, x_t=x_t, t=t)
    check_name("source", source, QUANTITIES)
    check_name("target", target, QUANTITIES)
    if value.shape != x_t.shape:
        raise ValueError(
            f"value ({source}) has shape {tuple(value.shape)}, expected {tuple(x_t.shape)} as x_t"
        )
    if source == target:
        return value

    coef_x_t, coef = schedule.on_device(_float32_conversion, x_t.device, source, target)
    compute = torch.float64 if torch.float64 in (value.dtype, x_t.dtype) else torch.float32
    x = x_t.to(compute)
    out = per_sample(coef_x_t, t, x) * x + per_sample(coef, t, x) * value.to(compute)
    return out.to(value.dtype)


def _float32_conversion(
    schedule: NoiseSchedule, device: torch.device, source: str, target: str
) -> tuple[Tensor, Tensor]:
    a, b = conversion(schedule, source, target)
    return a.to(device, torch.float32), b.to(device, torch.float32)
