"""Reference of `ddpm_step`: one ancestral step (DDPM algorithm 2, SPEC §7)."""

from __future__ import annotations

from torch import Tensor

from fastdiff.reference.philox_normal import philox_normal
from fastdiff.reference.step_table import StepColumn, StepRows, check_step, guide, predict_x0


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
    """x_s = mu~(x0, x_t) + sigma z, no noise in the last step (DDPM algorithm 2, SPEC §7).

    x0 is what the (guided) model output implies, clipped to [-1, 1] if asked. With
    `learned_range` the second half of the output's channels, v, sets the variance per element:
    log sigma^2 = LOG_VARIANCE + LOG_VARIANCE_SLOPE v, which is IDDPM eq. 15 for a table with
    variance="learned_range", and v itself for one with variance="learned".
    Arithmetic is float32 whatever the dtype of the tensors (float64 for float64), rounded once.

    Parameters
    ----------
    x_t
        (B, C, ...), floating point.
    model_output
        (B, C, ...); (B, 2C, ...) with `learned_range`.
    step
        (B,) int64: row of `table` for each sample. Row 0 is the last step executed.
    table
        (S, K) float32 from `NoiseSchedule.ddpm_table`.
    prediction
        What the network predicts: "eps", "x0", "v" or "mean".
    learned_range
        Whether the output carries variance channels.
    clip
        Clip the predicted x0 to [-1, 1].
    uncond, guidance_scale
        Unconditional model output, shape as model_output: the mean uses
        uncond + guidance_scale (model_output - uncond); the variance is the conditional one.
    noise, seed, stream
        z itself, or what `philox_normal` makes it from; one of `noise` and `seed` is needed.
    return_pred_x0
        Also return the (clipped) x0.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        x_s, and x0 if asked for; shape and dtype of x_t.

    Raises
    ------
    ValueError
        Naming the argument, what was given and what was expected.
    """
    channels = x_t.shape[1] if x_t.dim() > 1 else 0
    check_step(
        "ddpm_step",
        x_t,
        model_output,
        step,
        table,
        prediction,
        uncond,
        noise,
        seed,
        (2 * channels if learned_range else channels,),
    )
    if noise is None and seed is None:
        raise ValueError("ddpm_step: pass either noise or seed; neither was given")
    c = StepColumn
    row = StepRows(table, step, x_t)
    x = x_t.to(row.dtype)
    output = guide(
        model_output[:, :channels].to(row.dtype),
        None if uncond is None else uncond[:, :channels].to(row.dtype),
        guidance_scale,
    )
    x0 = predict_x0(prediction, x, output, row)
    if clip:
        x0 = x0.clamp(-1, 1)
    sigma = row[c.SIGMA]
    if learned_range:
        v = model_output[:, channels:].to(row.dtype)
        sigma = sigma * (0.5 * row[c.LOG_VARIANCE_SLOPE] * v).exp()
    if noise is None:
        noise = philox_normal(x.shape, seed, stream=stream, dtype=row.dtype, device=x.device)
    mean = row[c.COEF_X0] * x0 + row[c.COEF_X_T] * x
    x_s = (mean + sigma * noise.to(row.dtype)).to(x_t.dtype)
    return (x_s, x0.to(x_t.dtype)) if return_pred_x0 else x_s
