"""`ddpm_step`: one ancestral step in one kernel."""

from __future__ import annotations

from torch import Tensor

from fastdiff.ops import _sampler_step


def ddpm_step(
    x_t: Tensor,
    model_output: Tensor,
    step: Tensor,
    table: Tensor,
    *,
    prediction: str = "eps",
    learned_range: bool = False,
    clip: bool = True,
    uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    return_pred_x0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_s = mu~(x0, x_t) + sigma z, no noise in the last step (DDPM algorithm 2, Math §7).

    x0 is what the (guided) model output implies, clipped to [-1, 1] if asked. With
    `learned_range` the second half of the output's channels, v, sets the variance per element:
    log sigma^2 = LOG_VARIANCE + LOG_VARIANCE_SLOPE v, which is IDDPM eq. 15 for a table with
    variance="learned_range", and v itself for one with variance="learned".
    Arithmetic is float32 whatever the dtype of the tensors (float64 for float64), rounded once. One
    pass over memory: with `seed` the noise is made in the kernel (Math §9) and never stored.

    Parameters
    ----------
    x_t
        (B, C, ...), floating point. Contiguous or channels_last; other strides work through a copy.
    model_output
        (B, C, ...); (B, 2C, ...) with `learned_range`.
    step
        (B,) int64: row of `table` for each sample. Row 0 is the last step executed.
    table
        (S, K) float32 from `NoiseSchedule.ddpm_table` (float64 tables, and ones that require
        grad, run on the reference).
    prediction
        What the network predicts: "eps", "x0", "v" or "mean".
    learned_range
        Whether the output carries variance channels.
    clip
        Clip the predicted x0 to [-1, 1]; an infinite one becomes a pixel too, which the samplers of
        fastdiff notice and the op does not.
    uncond, guidance_scale
        Unconditional model output, shape as model_output; scale finite, >= 0: the mean uses
        uncond + guidance_scale (model_output - uncond); the variance is the conditional one.
    noise, seed, stream
        z itself, or what `philox_normal` makes it from; one of `noise` and `seed` is needed.
    return_pred_x0
        Also return the (clipped) x0.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        x_s, and x0 if asked for; shape, dtype and memory format of x_t. Differentiable in x_t,
        model_output, uncond and noise, any number of times; the backward pass runs in plain
        PyTorch. Under autocast nothing is cast.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.
    IndexError
        step outside 0..S-1 on the CPU, and on CUDA under FASTDIFF_DEBUG=1 (without it such samples
        come out as NaN).

    Examples
    --------
    >>> import torch, fastdiff
    >>> schedule = fastdiff.NoiseSchedule.linear(1000)
    >>> table = schedule.ddpm_table(range(1000), "learned_range")
    >>> x_t, output = torch.randn(4, 3, 32, 32), torch.randn(4, 6, 32, 32)
    >>> step = torch.full((4,), 999)
    >>> x_s = fastdiff.ops.ddpm_step(x_t, output, step, table, learned_range=True, seed=0)
    """
    return _sampler_step.call(
        _op,
        "ddpm_step",
        x_t,
        model_output,
        step,
        table,
        prediction,
        clip,
        learned_range,
        uncond,
        guidance_scale,
        noise,
        seed,
        stream,
        return_pred_x0,
    )


_op = _sampler_step.define("ddpm_step")
