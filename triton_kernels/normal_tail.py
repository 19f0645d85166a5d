"""Probabilities of a discretized normal in log space: the twin of normal_tail.h in csrc/include.

Arithmetic is that of the header: its polynomials, because the hardware's exponential and logarithm
have fewer digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import log_positive
from .sampler_step import exp_of


@triton.jit
def exp_minus_linear(w):
    """exp(w) - 1 - w, within 2e-6 of itself: around 0 from its own series."""
    p = 1.9857802e-4 * w + 1.3933604e-3
    p = p * w + 8.3333607e-3
    p = p * w + 4.1666465e-2
    p = p * w + 1.6666667e-1
    p = p * w + 0.5
    return tl.where(tl.abs(w) < 0.3466, w * w * p, exp_of(w) - 1.0 - w)


@triton.jit
def minus_log1m(s):
    """-log(1 - s) for 0 <= s < 1, corrected by what the rounding of 1 - s did to s."""
    u = 1.0 - s
    kept = 1.0 - u
    return tl.where(kept == 0.0, s, -log_positive(u) * (s / tl.where(kept == 0.0, 1.0, kept)))


@triton.jit
def scaled_tail(x):
    """Tail probability of a standard normal beyond x >= 0, times exp(x^2 / 2); within 4e-7."""
    t = 1.0 / (1.0 + 0.25 * x)
    p = 0.019781969 * t - 0.080877136
    p = p * t + 0.095596768
    p = p * t - 0.031717215
    p = p * t + 0.063698937
    p = p * t + 0.058975207
    p = p * t + 0.081603098
    p = p * t + 0.093466356
    p = p * t + 0.099736432
    p = p * t + 0.099735567
    return p * t


@triton.jit
def bin_term(z, h, edge):
    """-log P(|Z - z| < h), its derivative by z, and h times its derivative by h.

    With edge 1 the bin has no upper end, with edge -1 no lower end. The header says how.
    """
    inner = edge == 0.0
    m = tl.abs(z)
    side = tl.where(inner, tl.where(z < 0.0, -1.0, 1.0), edge)
    y = m * h
    h2 = h * h

    a = side * z - h
    inside = a < 0.0
    distance = tl.abs(a)
    half_square = 0.5 * distance * distance
    decay = tl.where(inner, exp_of(-2.0 * y), 0.0)
    tail = scaled_tail(distance)
    far_tail = decay * scaled_tail(m + h)
    density = exp_of(-half_square)
    outside_mass = density * (tail + far_tail)
    mass = tl.where(inside, 1.0 - outside_mass, tail - far_tail)
    ratio = 0.398942280 * tl.where(inside, density, 1.0) / mass
    nll = tl.where(inside, minus_log1m(outside_mass), half_square - log_positive(mass))

    y2 = y * y
    series = y2 * y2 * (y2 - 15.0 * h2) + h2 * h2 * (45.0 * y2 - 15.0 * h2)
    series = series * (1.0 / 5040.0) + (y2 * (y2 - 6.0 * h2) + 3.0 * h2 * h2) * (1.0 / 120.0)
    series = series + (y2 - h2) * (1.0 / 6.0) + 1.0
    scale = exp_of(-0.5 * h2) / series
    sinhc = 1.0 + y2 * (1.0 / 6.0 + y2 * (1.0 / 120.0 + y2 * (1.0 / 5040.0)))
    cosh = 1.0 + y2 * (0.5 + y2 * (1.0 / 24.0 + y2 * (1.0 / 720.0)))
    narrow = inner & (h < 0.3) & (y < 0.5)
    density_nll = 0.5 * m * m + 0.918938533 - log_positive(2.0 * h * series)

    nll = tl.where(narrow, density_nll, nll)
    slope_z = tl.where(narrow, z * sinhc * scale, side * ratio * (1.0 - decay))
    slope_h = tl.where(narrow, -cosh * scale, -h * ratio * (1.0 + decay))
    return nll, slope_z, slope_h


@triton.jit
def decoder_term(x0, z, inverse_sigma):
    """The bin of x0: 256 levels in [-1, 1], the outer ones without an end."""
    edge = tl.where(x0 > 0.999, 1.0, tl.where(x0 < -0.999, -1.0, 0.0))
    return bin_term(z, inverse_sigma * 0.00392156862745098 + tl.zeros_like(z), edge)
