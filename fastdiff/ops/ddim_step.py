"""`ddim_step`: one step of DDIM in one kernel."""

from __future__ import annotations

from torch import Tensor

from fastdiff.ops import _sampler_step


def ddim_step(
    x_t: Tensor,
    model_output: Tensor,
    step: Tensor,
    table: Tensor,
    *,
    prediction: str = "eps",
    clip: bool = True,
    use_clipped_model_output: bool = True,
    uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    return_pred_x0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) eps + sigma z  (DDIM eq. 12, Math §7).

    x0 and eps are those that the (guided) model output implies. The row decides what is computed:
    `NoiseSchedule.ddim_table` gives DDIM, `ddim_encode_table` its inverse; see `StepColumn`.
    Arithmetic is float32 whatever the dtype of the tensors (float64 for float64), rounded once. One
    pass over memory: with `seed` the noise is made in the kernel (Math §9) and never stored.

    Parameters
    ----------
    x_t
        (B, C, ...), floating point. Contiguous or channels_last; other strides work through a copy.
    model_output
        (B, C, ...), or (B, 2C, ...) of a learned-variance model: the variance half is not read.
    step
        (B,) int64: row of `table` for each sample. Row 0 is the last step executed.
    table
        (S, K) float32 from `NoiseSchedule.ddim_table` (float64 tables, and ones that require
        grad, run on the reference).
    prediction
        What the network predicts: "eps", "x0", "v" or "mean".
    clip
        Clip the predicted x0 to [-1, 1]; an infinite one becomes a pixel too, which the samplers of
        fastdiff notice and the op does not.
    use_clipped_model_output
        After clipping, recompute eps from the clipped x0 (else keep the model's eps).
    uncond, guidance_scale
        Unconditional model output, shape as model_output; scale finite, >= 0: the output used is
        uncond + guidance_scale (model_output - uncond).
    noise, seed, stream
        z itself, or what `philox_normal` makes it from. Neither: z = 0, which is all that a table
        with eta = 0 needs.
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
    >>> table = schedule.ddim_table(range(0, 1000, 20))
    >>> x_t, cond, uncond = torch.randn(3, 4, 3, 32, 32)
    >>> step = torch.full((4,), 49)  # the noisiest row: the first one that a sampler executes
    >>> x_s = fastdiff.ops.ddim_step(x_t, cond, step, table, uncond=uncond, guidance_scale=3.0)
    """
    return _sampler_step.call(
        _op,
        "ddim_step",
        x_t,
        model_output,
        step,
        table,
        prediction,
        clip,
        use_clipped_model_output,
        uncond,
        guidance_scale,
        noise,
        seed,
        stream,
        return_pred_x0,
    )


_op = _sampler_step.define("ddim_step")
