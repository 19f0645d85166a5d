"""Reference of `vlb_terms`: one term of the variational bound per sample (Math §6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.reference.philox_normal import philox_normal
from fastdiff.reference.step_columns import (
    StepColumn,
    StepRows,
    eps_from_x0,
    predict_eps,
    predict_x0,
)

BIN_HALF_WIDTH = 1 / 255
EDGE = 0.999
"""Pixels beyond +-EDGE are the outermost of the 256 levels, whose bins are infinite."""


def gaussian_kl(z: Tensor, log_variance1: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mu1, s1^2) || N(mu2, s2^2)) in nats, z = (mu1 - mu2) / s2 (Math §6)."""
    w = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(w) - w + z.square())


def decoder_nll(z: Tensor, h: Tensor, edge: Tensor) -> Tensor:
    """-log of the normal probability of x0's bin, in nats (DDPM eq. 13, Math §6).

    Parameters
    ----------
    z
        (x0 - mean) / sigma.
    h
        Half of the bin's width over sigma.
    edge
        +1 where x0 is the highest level, whose bin ends at +infinity, -1 where it is the lowest,
        0 elsewhere.

    The mass of a bin far from the mean is the difference of two tails on that side, never of
    two numbers near 1: log Q(|z| - h) + log(1 - Q(|z| + h) / Q(|z| - h)) with Q(x) = Phi(-x). A bin
    much narrower than sigma holds 2 h times the density.
    """
    near = torch.special.log_ndtr(h - z.abs())
    narrow = h * (1 + z.abs()) < 1e-5
    # The untaken branches get harmless values, or their infinite slopes would reach the gradient.
    step = torch.where(narrow, -1.0, torch.special.log_ndtr(-h - z.abs()) - near)
    density = (2 * h).log() - 0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    inner = torch.where(narrow, density, near + (-torch.expm1(step)).log())
    outer = torch.special.log_ndtr(h - edge * z)
    return -torch.where(edge == 0, inner, outer)


def vlb_terms(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    prediction: str = "eps",
    learned: bool = False,
    clip: bool = True,
    detach_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastdiff.ops.vlb_terms`; `learned` says whether the output has variance channels.

    Computes in float32, the decoder's probabilities in float64; everything in float64 if x0, x_t or
    the model's output is.
    """
    wide = torch.float64 in (x0.dtype, x_t.dtype, model_output.dtype)
    compute = torch.float64 if wide else torch.float32
    c = StepColumn
    x0, x_t, model_output = (x.to(compute) for x in (x0, x_t, model_output))
    row = StepRows(table, t, x_t)
    if noise is None:
        noise = philox_normal(x_t.shape, seed, stream=stream, dtype=compute, device=x_t.device)
    channels = x_t.shape[1]
    output = model_output[:, :channels]
    if detach_mean:
        output = output.detach()
    log_variance = row[c.LOG_VARIANCE].expand_as(x_t)
    if learned:
        v = model_output[:, channels:]
        log_variance = log_variance + row[c.LOG_VARIANCE_SLOPE] * v

    pred_x0 = predict_x0(prediction, x_t, output, row)
    pred_eps = predict_eps(prediction, x_t, output, pred_x0, row)
    if clip:
        # Where the clip does nothing this is the same eps, but without its rounding errors.
        clipped = pred_x0.abs() > 1
        pred_x0 = pred_x0.clamp(-1, 1)
        pred_eps = torch.where(clipped, eps_from_x0(x_t, pred_x0, row), pred_eps)

    # The posterior's mean and the model's differ in x0 alone.
    z = row[c.COEF_X0] * (x0 - pred_x0) * (-0.5 * log_variance).exp()
    kl = gaussian_kl(z, row[c.POSTERIOR_LOG_VARIANCE], log_variance)
    first = (t == 0).reshape(-1, *[1] * (x_t.dim() - 1))
    # Other samples' values are kept out of the decoder, where they might be infinite.
    edge = (x0 > EDGE).double() - (x0 < -EDGE).double()
    h = BIN_HALF_WIDTH * (-0.5 * torch.where(first, log_variance, 0.0).double()).exp()
    nll = decoder_nll(torch.where(first, z, 0.0).double(), h, edge)
    terms = torch.where(first, nll.to(compute), kl) / math.log(2)

    elements = x_t.shape[1:].numel()

    def mean(x: Tensor) -> Tensor:
        return x.reshape(len(x_t), elements).mean(1)

    return mean(terms), mean((x0 - pred_x0).square()), mean((noise.to(compute) - pred_eps).square())
