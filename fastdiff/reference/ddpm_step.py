"""Reference of `ddpm_step`: one ancestral step (DDPM algorithm 2, Math §7)."""

from __future__ import annotations

from torch import Tensor

from fastdiff.reference.philox_normal import philox_normal
from fastdiff.reference.step_columns import StepColumn, StepRows, check_step, guide, predict_x0


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
    """See `fastdiff.ops.ddpm_step`. Computes in float32, in float64 for float64 x_t.

    Raises
    ------
    ValueError
        On what `check_step` refuses, and without noise and seed.
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
