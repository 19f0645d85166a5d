"""`vlb_terms`: one term of the variational bound per sample, with the errors of x0 and eps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.ops import _checks
from fastdiff.reference.step_table import NUM_STEP_COLUMNS, PREDICTIONS
from fastdiff.step_tables import LEARNED_VARIANCES, VARIANCES


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
    variance: str = "fixed_large",
    clip: bool = True,
    detach_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_{t-1} = KL(q(x_{t-1}|x_t,x0) || p(x_{t-1}|x_t)), at t = 0 L_0 = -log p(x0|x_1), per sample.

    In bits per dimension (DDPM eqs. 5 and 13, SPEC §6), with the mean squared errors of the
    predicted x0 and eps, all from one pass over the data. L_0 is the discretized Gaussian decoder:
    256 levels in [-1, 1], half-width 1/255, the outer bins infinite, with exact normal
    probabilities (published code approximates them), accurate in both tails. Sums are float32
    whatever the dtype of the tensors, taken in a fixed order that does not depend on the batch.

    Parameters
    ----------
    x0
        (B, C, ...), floating point; where t = 0 it should hold pixel levels 2 k / 255 - 1, which
        bfloat16 rounds by up to half a bin.
    x_t
        Same shape, floating point. Contiguous or channels_last; other strides work through a copy.
    model_output
        (B, C, ...); (B, 2C, ...) for learned variances, read in place.
    t
        (B,) int64, 0-based timesteps: the row of `table` for each sample.
    table
        (T, K) float32: `NoiseSchedule.ddpm_table(torch.arange(T), variance)`.
    noise
        Same shape as x_t: the noise in x_t, which the error of eps is taken against. Exclusive
        with `seed`; one of them is needed.
    seed, stream
        What `q_sample` made the noise from (an int, or int64 keys (B,)): it is made again in the
        kernel and never touches memory.
    prediction
        What the network predicts: "eps", "x0", "v" or "mean".
    variance
        "fixed_large", "fixed_small", "learned" or "learned_range", as the table was built for.
    clip
        Clip the predicted x0 to [-1, 1], as samplers do and as bounds are reported; its mean and
        eps follow. Train with clip=False: clipped elements give the network no gradient.
    detach_mean
        Give no gradient to the prediction, only to the variance channels (L_vlb in IDDPM's hybrid
        loss, eq. 16). The values do not change.

    Returns
    -------
    tuple of Tensor
        kl (bits/dim), x0_mse, eps_mse; each (B,) float32 (float64 if x0, x_t or model_output is).
        Differentiable in model_output; in x0, x_t and noise on the reference. Under autocast
        nothing is cast.

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
    >>> schedule = fastdiff.NoiseSchedule.linear(1000)
    >>> table = schedule.ddpm_table(torch.arange(1000), variance="fixed_small")
    >>> x0 = torch.randint(256, (4, 3, 8, 8)) / 127.5 - 1
    >>> t = torch.tensor([0, 1, 500, 999])
    >>> tables = schedule.tables("cpu")
    >>> x_t = fastdiff.ops.q_sample(
    ...     x0, t, tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar, seed=0
    ... )
    >>> kl, x0_mse, eps_mse = fastdiff.ops.vlb_terms(
    ...     x0, x_t, torch.zeros_like(x_t), t, table, seed=0, variance="fixed_small"
    ... )
    """
    if (noise is None) == (seed is None):
        given = "neither" if noise is None else "both"
        raise ValueError(f"vlb_terms: pass either noise or seed; {given} was given")
    for name, value, known in (
        ("prediction", prediction, PREDICTIONS),
        ("variance", variance, VARIANCES),
    ):
        if value not in known:
            raise ValueError(f"vlb_terms: unknown {name} {value!r}; choose from {', '.join(known)}")
    keys, integer = _checks.split_seed("vlb_terms", seed)
    stream = _checks.as_int64("vlb_terms", "stream", stream)
    arguments = (
        x0,
        x_t,
        model_output,
        t,
        table,
        noise,
        keys,
        integer,
        stream,
        PREDICTIONS.index(prediction),
        variance in LEARNED_VARIANCES,
        clip,
        detach_mean,
    )
    _check(*arguments, check_range=True)
    return _reference(*arguments)


def _check(
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


def _reference(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.vlb_terms(
        x0,
        x_t,
        model_output,
        t,
        table,
        noise=noise,
        seed=keys if keys is not None else seed,
        stream=stream,
        prediction=PREDICTIONS[prediction],
        learned=learned,
        clip=clip,
        detach_mean=detach_mean,
    )
