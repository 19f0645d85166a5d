"""Reference of `ddim_step`: one step of DDIM (DDIM eq. 12, Math §7)."""

from __future__ import annotations

from torch import Tensor

from fastdiff.reference.philox_normal import philox_normal
from fastdiff.reference.step_columns import (
    StepColumn,
    StepRows,
    check_step,
    eps_from_x0,
    guide,
    predict_eps,
    predict_x0,
)


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
    """See `fastdiff.ops.ddim_step`. Computes in float32, in float64 for float64 x_t.

    Raises
    ------
    ValueError
        On what `check_step` refuses.
    """
    channels = x_t.shape[1] if x_t.dim() > 1 else 0
    check_step(
        "ddim_step",
        x_t,
        model_output,
        step,
        table,
        prediction,
        uncond,
        noise,
        seed,
        (channels, 2 * channels),
    )
    c = StepColumn
    row = StepRows(table, step, x_t)
    x = x_t.to(row.dtype)
    output = guide(
        model_output[:, :channels].to(row.dtype),
        None if uncond is None else uncond[:, :channels].to(row.dtype),
        guidance_scale,
    )
    x0 = predict_x0(prediction, x, output, row)
    eps = predict_eps(prediction, x, output, x0, row)
    if clip:
        x0 = x0.clamp(-1, 1)
        if use_clipped_model_output:
            eps = eps_from_x0(x, x0, row)
    x_s = row[c.COEF_X0] * x0 + row[c.COEF_X_T] * x + row[c.COEF_EPS] * eps
    if seed is not None:
        noise = philox_normal(x.shape, seed, stream=stream, dtype=row.dtype, device=x.device)
    if noise is not None:
        x_s = x_s + row[c.SIGMA] * noise.to(row.dtype)
    x_s = x_s.to(x_t.dtype)
    return (x_s, x0.to(x_t.dtype)) if return_pred_x0 else x_s
