"""The raw operators' arguments for tests that are about all ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.ops._sampler_step import DDIM, DDPM

F64 = torch.float64
SHAPE = (2, 4, 3, 3)
SCHEDULE = fastdiff.NoiseSchedule.linear(1000)
GENERATOR = torch.Generator()


def fractions(*shape: int, largest: int = 127) -> Tensor:
    """Multiples of 1 / 64 of at most 7 bits."""
    return torch.randint(-largest, largest + 1, shape, generator=GENERATOR).double() / 64


def arguments(op: str) -> dict[str, Any]:
    """The raw operator's arguments with given noise, in float64."""
    GENERATOR.manual_seed(0)
    batch, channels, *rest = SHAPE
    noise = {"noise": fractions(*SHAPE), "keys": None, "seed": None, "stream": 3}
    if op == "q_sample":
        tables = SCHEDULE.sqrt_alpha_bars, SCHEDULE.sqrt_one_minus_alpha_bars
        a, b = (x.float().double() for x in tables)
        return {
            "x0": fractions(*SHAPE, largest=64),
            "t": torch.tensor([7, 600]),
            "sqrt_alpha_bar": a,
            "sqrt_one_minus_alpha_bar": b,
            **noise,
            "flip": torch.tensor([True, False]),
            "dtype": None,
        }
    if op == "eps_loss":
        weight = torch.tensor([0.5, 1.25], dtype=F64)
        prediction = fractions(*SHAPE)
        return {"prediction": prediction, **noise, "weight": weight, "reduction": 1, "kind": 0}
    if op == "vlb_terms":
        return {
            "x0": fractions(*SHAPE, largest=64),
            "x_t": fractions(*SHAPE),
            "model_output": fractions(batch, 2 * channels, *rest),
            "t": torch.tensor([0, 600]),
            "table": SCHEDULE.ddpm_table(torch.arange(1000), "learned_range").double(),
            **noise,
            "prediction": 2,
            "learned": True,
            "clip": True,
            "detach_mean": False,
        }
    if op in (DDIM, DDPM):
        rows = torch.tensor([5, 300])
        learned = SCHEDULE.ddpm_table(rows, "learned_range")
        table = learned if op == DDPM else SCHEDULE.ddim_table(rows, 0.7)
        return {
            "x_t": fractions(*SHAPE),
            "model_output": fractions(batch, 2 * channels, *rest),
            "step": torch.tensor([1, 0]),
            "table": table.double(),
            "prediction": 0,
            "clip": False,
            "flag": True,
            "uncond": fractions(batch, 2 * channels, *rest),
            "guidance_scale": 1.5,
            **noise,
            "return_pred_x0": True,
        }
    return {
        "x": fractions(*SHAPE),
        "num_groups": 2,
        "weight": fractions(channels),
        "bias": fractions(channels),
        "eps": 1e-5,
        **{name: fractions(batch, channels) for name in ("channel_bias", "scale", "shift")},
        "activation": 0,
    }
