"""The calls that are verified: ops, arguments, and the roundings a result may carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion.schedules import NoiseSchedule

NUM_TIMESTEPS = 1000
# Odd sizes: no vector length divides a sample, and the last block is never full.
SHAPES = {"nchw": (3, 8, 15, 13), "channels_last": (3, 8, 15, 13), "vectors": (2, 8, 16, 16)}
LAYOUTS = tuple(SHAPES)
_SEED, _STREAM = 2**62 + 11, 5


@dataclass
class Inputs:
    """Random tensors of one dtype and layout; the same for every backend."""

    dtype: torch.dtype
    layout: str
    device: torch.device
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.layout]

    @property
    def batch(self) -> int:
        return self.shape[0]

    def normal(self, channels: int | None = None) -> Tensor:
        shape = (self.shape[0], channels or self.shape[1], *self.shape[2:])
        return self._placed(torch.randn(shape, generator=self.generator).to(self.dtype))

    def levels(self) -> Tensor:
        return self._placed(
            torch.randint(256, self.shape, generator=self.generator, dtype=torch.uint8)
        )

    def pixels(self) -> Tensor:
        """Levels scaled to [-1, 1]."""
        return self._placed((self.levels().cpu().double() / 127.5 - 1).to(self.dtype))

    def per_channel(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def timesteps(self, num: int = NUM_TIMESTEPS) -> Tensor:
        return torch.linspace(0, num - 1, self.batch).long().to(self.device)

    def _placed(self, x: Tensor) -> Tensor:
        if self.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        return x.to(self.device)


@dataclass(frozen=True)
class Case:
    """One way to call one op.

    `arguments(inputs)` are the keyword arguments; those in `differentiable` get gradients.
    `operations` bounds the float32 roundings on the way to any element of any result, counting a
    function of k ulps as 2 k, and a sum over n elements in chunks and trees as sqrt(n) or less.
    """

    op: str
    variant: str
    arguments: Callable[[Inputs], dict[str, Any]]
    differentiable: tuple[str, ...] = ()
    operations: int = 8
    # Arguments that the float64 reference gets instead.
    in_double: Mapping[str, Any] = field(default_factory=dict)
    # Outputs that gradients come from.
    outputs: tuple[int, ...] = (0,)

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.op)


_NORMAL = 16  # roundings of a generated normal: two functions of 1 ulp, a root, products


def _forward_tables(x: Inputs) -> dict[str, Tensor]:
    tables = NoiseSchedule.linear(NUM_TIMESTEPS).tables(x.device)
    return {
        "sqrt_alpha_bar": tables.sqrt_alpha_bar,
        "sqrt_one_minus_alpha_bar": tables.sqrt_one_minus_alpha_bar,
    }


def _q_sample(x: Inputs, **noise: Any) -> dict[str, Any]:
    return {"x0": x.pixels(), "t": x.timesteps(), **_forward_tables(x), **noise}


def _q_sample_uint8(x: Inputs) -> dict[str, Any]:
    flip = torch.arange(x.batch, device=x.device) % 2 == 0
    arguments = _q_sample(x, seed=_SEED, stream=_STREAM, flip=flip, dtype=x.dtype)
    return {**arguments, "x0": x.levels()}


def _philox_normal(x: Inputs) -> dict[str, Any]:
    last = x.layout == "channels_last"
    return {
        "shape": x.shape,
        "seed": _SEED,
        "stream": _STREAM,
        "dtype": x.dtype,
        "device": x.device,
        "memory_format": torch.channels_last if last else torch.contiguous_format,
    }


def _posterior_mean(x: Inputs) -> dict[str, Any]:
    tables = NoiseSchedule.linear(NUM_TIMESTEPS).tables(x.device)
    return {
        "x0": x.pixels(),
        "x_t": x.normal(),
        "t": x.timesteps(),
        "coef_x0": tables.posterior_coef_x0,
        "coef_x_t": tables.posterior_coef_x_t,
    }


def _eps_loss(x: Inputs, **options: Any) -> dict[str, Any]:
    weight = x.per_channel(x.batch).abs() + 0.5
    return {"prediction": x.normal(), "weight": weight, **options}


def _step(x: Inputs, table: Tensor, channels: int = 1, **options: Any) -> dict[str, Any]:
    return {
        "x_t": x.normal(),
        "model_output": x.normal(channels * x.shape[1]),
        "step": x.timesteps(len(table)),
        "table": table.to(x.device),
        **options,
    }


def _ddim_table() -> Tensor:
    return NoiseSchedule.cosine(NUM_TIMESTEPS).ddim_table(torch.arange(0, 900, 20), eta=0.7)


def _guided_ddim(x: Inputs) -> dict[str, Any]:
    arguments = _step(x, _ddim_table(), guidance_scale=3.0, seed=_SEED, stream=_STREAM)
    return {**arguments, "uncond": x.normal(), "return_pred_x0": True}


def _learned_ddpm(x: Inputs) -> dict[str, Any]:
    table = NoiseSchedule.cosine(NUM_TIMESTEPS).ddpm_table(
        torch.arange(0, 900, 20), "learned_range"
    )
    return _step(x, table, 2, learned_range=True, prediction="v", seed=_SEED, stream=_STREAM)


def _vlb_terms(x: Inputs) -> dict[str, Any]:
    schedule = NoiseSchedule.linear(NUM_TIMESTEPS)
    return {
        "x0": x.pixels(),
        "x_t": x.normal(),
        "model_output": x.normal(2 * x.shape[1]),
        "t": x.timesteps(),
        "table": schedule.ddpm_table(torch.arange(NUM_TIMESTEPS), "learned_range").to(x.device),
        "seed": _SEED,
        "variance": "learned_range",
        "clip": False,
    }


def _group_norm_silu(x: Inputs, **options: Any) -> dict[str, Any]:
    channels = x.shape[1]
    return {
        "x": x.normal(),
        "num_groups": 4,
        "weight": x.per_channel(channels),
        "bias": x.per_channel(channels),
        **{name: x.per_channel(x.batch, channels) for name in options.pop("per_sample", ())},
        **options,
    }


def _residual_group_norm_silu(x: Inputs) -> dict[str, Any]:
    """Of summands whose sum every dtype has: multiples of 1/8 below 8."""

    def eighths(value: Tensor, largest: float) -> Tensor:
        return (value * 8).round().clamp(-8 * largest, 8 * largest) / 8

    arguments = _group_norm_silu(x, per_sample=("scale", "shift"))
    return {
        **arguments,
        "x": eighths(arguments["x"], 3),
        "residual": eighths(x.normal(), 3),
        "sum_bias": eighths(x.per_channel(x.shape[1]), 1),
    }


# The longest sum is over one sample of at most 1,560 elements (40 = its square root), for the
# parameters of a normalization over the batch too.
CASES = (
    Case("q_sample", "noise given", lambda x: _q_sample(x, noise=x.normal()), ("x0", "noise")),
    Case(
        "q_sample",
        "noise generated",
        lambda x: _q_sample(x, seed=_SEED, stream=_STREAM),
        ("x0",),
        8 + _NORMAL,
    ),
    Case(
        "q_sample",
        "uint8, flipped",
        _q_sample_uint8,
        operations=8 + _NORMAL,
        in_double={"dtype": torch.float64},
    ),
    Case(
        "philox_normal",
        "normals",
        _philox_normal,
        operations=_NORMAL,
        in_double={"dtype": torch.float64},
    ),
    Case("posterior_mean", "mean", _posterior_mean, ("x0", "x_t")),
    *(
        Case(
            "eps_loss",
            f"{kind}, {'generated' if generated else 'given'}",
            lambda x, kind=kind, generated=generated: _eps_loss(
                x,
                kind=kind,
                reduction="none",
                **({"seed": _SEED} if generated else {"noise": x.normal()}),
            ),
            ("prediction", "weight") if generated else ("prediction", "noise", "weight"),
            40 + 8 + 2 * _NORMAL * generated,
        )
        for kind, generated in (("mse", False), ("mse", True), ("l1", False), ("huber", True))
    ),
    Case("ddim_step", "guided, eta 0.7", _guided_ddim, operations=24 + _NORMAL),
    Case("ddpm_step", "learned range, v", _learned_ddpm, operations=24 + _NORMAL),
    Case("vlb_terms", "learned range", _vlb_terms, ("model_output",), 40 + 64 + 2 * _NORMAL),
    Case("group_norm_silu", "plain", _group_norm_silu, ("x", "weight", "bias"), 40 + 48),
    Case(
        "group_norm_silu",
        "time, AdaGN",
        lambda x: _group_norm_silu(x, per_sample=("channel_bias", "scale", "shift")),
        ("x", "weight", "bias", "channel_bias", "scale", "shift"),
        40 + 64,
    ),
    Case(
        "group_norm_silu",
        "identity",
        lambda x: _group_norm_silu(x, activation="identity"),
        ("x", "weight", "bias"),
        40 + 32,
    ),
    Case(
        "group_norm_silu",
        "time, dropout",
        lambda x: _group_norm_silu(
            x, per_sample=("channel_bias",), dropout_p=0.3, seed=_SEED, stream=_STREAM
        ),
        ("x", "weight", "bias", "channel_bias"),
        40 + 56,
    ),
    Case(
        "residual_group_norm_silu",
        "sum, AdaGN",
        _residual_group_norm_silu,
        ("x", "residual", "weight", "bias", "scale", "shift", "sum_bias"),
        40 + 64,
        outputs=(0, 1),
    ),
)
