"""vlb_terms, forward and with the backward of kl, against a copy, eager PyTorch and torch.compile.

Eager computes in float32 what published code computes: KL and decoder of every sample, one of them
chosen by t. GB/s counts the bytes a perfect kernel moves: forward reads x0, x_t, the noise and the
model's output (2C channels if it learns the variance); backward reads all but the noise again and
writes the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import fastdiff
from benchmarks.op_table import Case, Op, Spec, spec_workload
from fastdiff import ops
from fastdiff.reference.step_columns import StepColumn

T = 1000
MODES = ("forward fixed", "forward learned", "train learned")
VARIANCES = {"fixed": "fixed_large", "learned": "learned_range"}


def eager(
    x0: Tensor, x_t: Tensor, output: Tensor, t: Tensor, table: Tensor, noise: Tensor
) -> Tensor:
    """kl in bits per dimension and both squared errors, (3, B), for a network that predicts eps."""
    c = StepColumn
    rows = table[t].reshape(len(t), -1, *[1] * (x0.dim() - 1))
    x0, x_t, output, noise = (x.float() for x in (x0, x_t, output, noise))
    channels = x_t.shape[1]
    eps = output[:, :channels]
    log_variance = rows[:, c.LOG_VARIANCE].expand_as(x_t)
    if output.shape[1] > channels:
        log_variance = log_variance + rows[:, c.LOG_VARIANCE_SLOPE] * output[:, channels:]
    pred_x0 = rows[:, c.RECIP_SQRT_ALPHA_BAR] * x_t - rows[:, c.NOISE_TO_SIGNAL] * eps
    true_mean = rows[:, c.COEF_X0] * x0 + rows[:, c.COEF_X_T] * x_t
    mean = rows[:, c.COEF_X0] * pred_x0 + rows[:, c.COEF_X_T] * x_t
    posterior = rows[:, c.POSTERIOR_LOG_VARIANCE]
    w = posterior - log_variance
    kl = 0.5 * (-1 - w + w.exp() + (true_mean - mean).square() * (-log_variance).exp())
    inverse_sigma = (-0.5 * log_variance).exp()
    upper, lower = ((x0 - mean + s / 255) * inverse_sigma for s in (1, -1))
    upper_cdf, lower_cdf = (torch.special.ndtr(x) for x in (upper, lower))
    nll = -torch.where(
        x0 < -0.999,
        upper_cdf.clamp(min=1e-12).log(),
        torch.where(
            x0 > 0.999,
            (1 - lower_cdf).clamp(min=1e-12).log(),
            (upper_cdf - lower_cdf).clamp(min=1e-12).log(),
        ),
    )
    first = (t == 0).reshape(-1, *[1] * (x_t.dim() - 1))
    terms = torch.where(first, nll, kl) / math.log(2)
    results = terms, (x0 - pred_x0).square(), (noise - eps).square()
    return torch.stack([x.flatten(1).mean(1) for x in results])


def gradient(*arguments: Tensor, forward: Callable[..., Tensor] = eager) -> Tensor:
    output = arguments[2]
    (found,) = torch.autograd.grad(forward(*arguments)[0].sum(), output)
    return found


def specify(case: Case) -> Spec:
    """The tensors of one workload, and what a right result is."""
    shape, dtype, memory_format, device = case.shape, case.dtype, case.memory_format, case.device
    generator = torch.Generator().manual_seed(0)
    passes, kind = case.mode.split()
    variance = VARIANCES[kind]
    schedule = fastdiff.NoiseSchedule.linear(T)
    table = schedule.ddpm_table(torch.arange(T), variance=variance).to(device)
    t = torch.randint(T, shape[:1], generator=generator).to(device)
    x0 = torch.randint(256, shape, generator=generator) / 127.5 - 1
    noise, error = (torch.randn(shape, generator=generator) for _ in range(2))
    tables = schedule.tables("cpu")
    a, s = tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar
    x_t = ops.q_sample(x0, t.cpu(), a, s, noise)
    output = noise + 0.1 * error
    if kind == "learned":
        output = torch.cat([output, error], 1)
    x0, x_t, output, noise = (
        x.to(device, dtype, memory_format=memory_format) for x in (x0, x_t, output, noise)
    )
    how = {"noise": noise, "variance": variance, "clip": False}
    arguments = (x0, x_t, output, t, table, noise)
    wide = [x.double() for x in (x0, x_t, output)]
    moved = x0.nbytes + x_t.nbytes + output.nbytes + noise.nbytes
    if passes == "forward":
        exact = torch.stack(ops.vlb_terms(*wide, t, table, **{**how, "noise": noise.double()}))

        def ours() -> tuple[Tensor, ...]:
            return ops.vlb_terms(x0, x_t, output, t, table, **how)

        function, tolerance = eager, 1e-4
    else:
        output.requires_grad_()
        wide[2].requires_grad_()
        exact_kl = ops.vlb_terms(*wide, t, table, **{**how, "noise": noise.double()})[0]
        (exact,) = torch.autograd.grad(exact_kl.sum(), wide[2])
        moved += x0.nbytes + x_t.nbytes + 2 * output.nbytes

        def ours() -> Tensor:
            kl = ops.vlb_terms(x0, x_t, output, t, table, **how)[0]
            (found,) = torch.autograd.grad(kl.sum(), output)
            return found

        function, tolerance = gradient, max(4 * torch.finfo(dtype).eps, 1e-3)
    compiled = eager if function is gradient else None
    return Spec(ours, function, arguments, exact, tolerance, moved, x0, compiled)


OP = Op("vlb_terms", MODES, spec_workload(specify), tiny_modes=MODES[:2])
