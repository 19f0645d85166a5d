"""Cases of vlb_terms, their exact results in float64, and what rounding may do to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import NoiseSchedule, reference
from fastdiff.diffusion.step_tables import LEARNED_VARIANCES, VARIANCES
from fastdiff.reference.step_columns import PREDICTIONS, StepColumn, StepRows
from fastdiff.reference.vlb_terms import BIN_HALF_WIDTH, EDGE, decoder_nll

from .inputs import SHAPES, arrange

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULE = NoiseSchedule.linear(1000)
TABLES = {v: SCHEDULE.ddpm_table(torch.arange(1000), variance=v) for v in VARIANCES}


@dataclass(frozen=True)
class Case:
    shape: str = "vectors"
    layout: str = "contiguous"
    dtype: str = "fp32"
    data: str | None = None  # dtype of x0, x_t and noise; default that of the output
    mode: str = "given"
    prediction: str = "eps"
    variance: str = "learned_range"
    clip: bool = True
    detach_mean: bool = False
    t: tuple[int, ...] = (0, 37, 800)

    def __str__(self) -> str:
        parts = [self.shape, self.layout, self.dtype, self.mode, self.prediction, self.variance]
        parts += [f"data {self.data}"] if self.data else []
        parts += [] if self.clip else ["unclipped"]
        parts += ["detached"] if self.detach_mean else []
        return ", ".join([*parts, f"t {'/'.join(map(str, self.t))}"])


def arguments(case: Case) -> dict:
    """The raw operator's arguments: a network that is right up to errors of a few tenths."""
    generator = torch.Generator().manual_seed(0)
    shape, seed, stream = SHAPES[case.shape], 2**63 - 5, 2**40 + 3
    batch = shape[0]
    t = torch.tensor([case.t[k % len(case.t)] for k in range(batch)], dtype=torch.int64)
    keys = reference.sample_keys(seed, batch)
    noise = torch.randn(shape, generator=generator)
    if case.mode != "given":
        noise = reference.normals(keys, shape, stream, torch.float32)
    levels = torch.randint(256, shape, generator=generator)
    levels[levels < 20], levels[levels > 235] = 0, 255  # some of the outer bins
    x0 = levels / 127.5 - 1
    tables = SCHEDULE.tables("cpu")
    a, s = tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar
    x_t = reference.q_sample(x0, t, a, s, noise)
    a, s = (x[t].reshape(-1, *[1] * (x0.dim() - 1)) for x in (a, s))
    output = {
        "eps": noise,
        "x0": x0,
        "v": a * noise - s * x0,
        "mean": reference.posterior_mean(
            x0, x_t, t, tables.posterior_coef_x0, tables.posterior_coef_x_t
        ),
    }[case.prediction]
    output = output + 0.3 * torch.randn(shape, generator=generator)
    if case.variance in LEARNED_VARIANCES:
        v = torch.randn(shape, generator=generator)
        v = 0.7 * v if case.variance == "learned_range" else v - 4
        output = torch.cat([output, v], 1)
    data = FLOATS[case.data or case.dtype]
    return {
        "x0": arrange(x0.to(data), case.layout),
        "x_t": arrange(x_t.to(data), case.layout),
        "model_output": arrange(output.to(FLOATS[case.dtype]), case.layout),
        "t": t,
        "table": TABLES[case.variance],
        "noise": arrange(noise.to(data), case.layout) if case.mode == "given" else None,
        "keys": keys if case.mode == "keys" else None,
        "seed": seed if case.mode == "seed" else None,
        "stream": stream,
        "prediction": PREDICTIONS.index(case.prediction),
        "learned": case.variance in LEARNED_VARIANCES,
        "clip": case.clip,
        "detach_mean": case.detach_mean,
    }


def double_arguments(args: dict) -> dict:
    """The same values in float64, with stored noise."""
    exact = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in args.items()
    }
    keys = args["keys"]
    if args["seed"] is not None:
        keys = reference.sample_keys(args["seed"], len(args["x_t"]))
    if keys is not None:
        exact["noise"] = reference.normals(keys, args["x_t"].shape, args["stream"], torch.float64)
    return exact | {"keys": None, "seed": None}


class Magnitudes:
    """Sums of absolute values behind every element, as rounding errors are relative to these.

    Attributes
    ----------
    kl, x0_mse, eps_mse
        (B,), of the means.
    output, v
        Of the gradient of grad . (kl, x0_mse, eps_mse) by the two halves of the model's output.
    """

    def __init__(self, args: dict, grad: Tensor) -> None:
        e = double_arguments(args)
        c, x0, x, noise = StepColumn, e["x0"], e["x_t"], e["noise"]
        row = StepRows(e["table"], e["t"], x)
        channels = x.shape[1]
        output = e["model_output"][:, :channels]
        v = e["model_output"][:, channels:] if e["learned"] else torch.zeros_like(x)
        s, ratio = row[c.RECIP_SQRT_ONE_MINUS_ALPHA_BAR], row[c.SIGNAL_TO_NOISE]
        prediction = PREDICTIONS[e["prediction"]]
        x0_x, x0_output, eps_x, eps_output = {
            "eps": (row[c.RECIP_SQRT_ALPHA_BAR], row[c.NOISE_TO_SIGNAL], 0 * s, 1 + 0 * s),
            "x0": (0 * s, 1 + 0 * s, s, ratio),
            "v": (
                row[c.SQRT_ALPHA_BAR],
                row[c.SQRT_ONE_MINUS_ALPHA_BAR],
                row[c.SQRT_ONE_MINUS_ALPHA_BAR],
                row[c.SQRT_ALPHA_BAR],
            ),
            "mean": (
                row[c.X0_FROM_MEAN_X_T],
                row[c.X0_FROM_MEAN],
                s + ratio * row[c.X0_FROM_MEAN_X_T],
                ratio * row[c.X0_FROM_MEAN],
            ),
        }[prediction]
        raw = x0_x * x.abs() + x0_output * output.abs()  # x0^ before the clip
        signed = x0_x * x * (-1 if prediction == "mean" else 1)
        sign = -1 if prediction in ("eps", "v") else 1
        pred = signed + sign * x0_output * output
        clipped = (pred.abs() > 1) & e["clip"]
        pred_size = torch.where(clipped, 1, raw)
        eps_size = torch.where(
            clipped, s * x.abs() + ratio, eps_x * x.abs() + eps_output * output.abs()
        )
        error = x0 - torch.where(clipped, pred.clamp(-1, 1), pred)
        error_size = x0.abs() + pred_size

        slope = row[c.LOG_VARIANCE_SLOPE].abs()
        log_size = 1 + row[c.LOG_VARIANCE].abs() + slope * v.abs()
        log_variance = row[c.LOG_VARIANCE] + row[c.LOG_VARIANCE_SLOPE] * v
        inverse = (-log_variance / 2).exp()
        scale = row[c.COEF_X0] * inverse
        z = scale * error
        # What a relative error of one makes of z, from the error's and the deviation's.
        z_size = scale * error_size + z.abs() * log_size
        w = row[c.POSTERIOR_LOG_VARIANCE] - log_variance
        w_size = row[c.POSTERIOR_LOG_VARIANCE].abs() + log_size
        kl = z.abs() * z_size + w.expm1().abs() * w_size + w.expm1() - w
        kl_v = 1 + w.exp() * w_size + z.abs() * z_size  # 1: the slope of w itself

        h = BIN_HALF_WIDTH * inverse
        edge = (x0 > EDGE).double() - (x0 < -EDGE).double()
        nll, by_z, by_h = self._decoder(z, h, edge)
        # The second derivatives of -log P by z and by h lie within [0, 1].
        spread = z_size + h * log_size
        by_z_size = by_z + spread + by_h  # by_h / h: the densities whose difference is by_z
        decoder = nll + by_z * (z_size + h) + h * by_h * log_size
        decoder_v = (z.abs() + h) * by_z_size + h * by_h * log_size
        first = (e["t"] == 0).reshape(-1, *[1] * (x.dim() - 1))

        def mean(terms: Tensor) -> Tensor:
            return terms.flatten(1).mean(1)

        self.kl = mean(torch.where(first, decoder, kl)) / math.log(2)
        self.x0_mse = mean(2 * error.abs() * error_size)
        eps = torch.where(clipped, s * x - ratio * pred.clamp(-1, 1), 0)
        eps_error = noise.abs() + torch.where(clipped, eps.abs(), eps_size)
        self.eps_mse = mean(2 * eps_error * (noise.abs() + eps_size))

        per_element = grad.double().abs() / max(1, x.shape[1:].numel())
        g_kl, g_x0, g_eps = (
            g.reshape(-1, *[1] * (x.dim() - 1)) for g in per_element.reshape(3, -1)
        )
        g_kl = g_kl / math.log(2)
        by_output = x0_output * (
            g_kl * scale * torch.where(first, by_z_size, z_size) * log_size + 2 * g_x0 * error_size
        ) + 2 * g_eps * eps_output * (noise.abs() + eps_size)
        self.output = torch.where(clipped, 0, by_output)
        self.v = g_kl * slope * torch.where(first, decoder_v, kl_v)

    @staticmethod
    def _decoder(z: Tensor, h: Tensor, edge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-log P and the absolute values of its derivatives by z and h."""
        z, h = z.detach().requires_grad_(), h.detach().requires_grad_()
        with torch.enable_grad():
            nll = decoder_nll(z, h, edge)
            by_z, by_h = torch.autograd.grad(nll.sum(), (z, h))
        return nll.detach(), by_z.abs(), by_h.abs()
