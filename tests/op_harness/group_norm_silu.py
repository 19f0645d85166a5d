"""Cases of group_norm_silu, their inputs, and the float64 result with the bound of its rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.reference.group_norm_silu import ACTIVATIONS, group_statistics

from .inputs import arrange

FLOATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
OPERANDS = ("weight", "bias", "channel_bias", "scale", "shift")

# (shape, num_groups)
SHAPES = {
    "vectors": ((2, 32, 8, 8), 8),
    "odd": ((3, 12, 7, 5), 3),
    "G = C": ((2, 6, 5, 3), 6),
    "G = 1": ((2, 10, 4, 4), 1),
    "HW = 1": ((3, 24, 1, 1), 4),
    "one element": ((2, 4, 1, 1), 4),
    "batch 0": ((0, 8, 4, 4), 2),
    "3-D": ((2, 12, 9), 4),
    "5-D": ((2, 8, 3, 4, 5), 2),
    "wide": ((2, 264, 3, 5), 8),
    "large group": ((1, 64, 24, 24), 2),
    "1024 elements": ((2, 16, 8, 16), 2),
    "2048 elements": ((1, 32, 8, 16), 2),
}


@dataclass(frozen=True)
class Case:
    shape: str = "vectors"
    layout: str = "contiguous"
    dtype: str = "fp32"
    values: str = "normal"  # "constant", "mean 1e4", "std 1000"
    operands: tuple[str, ...] = OPERANDS
    operand_dtype: str = "fp32"
    chunked: bool = False  # scale and shift are halves of one tensor
    activation: str = "silu"

    def __str__(self) -> str:
        parts = [self.shape, self.layout, self.dtype, self.values, self.activation]
        if self.operands != OPERANDS:
            parts.append(f"only {' '.join(self.operands) or 'x'}")
        parts += [f"operands {self.operand_dtype}"] if self.operand_dtype != "fp32" else []
        parts += ["chunked"] if self.chunked else []
        return ", ".join(parts)


CASES = [
    *(
        Case(layout=layout, dtype=dtype, operands=operands, activation=activation)
        for layout in ("contiguous", "channels_last")
        for dtype in ("fp32", "bf16", "fp16")
        for operands, activation in (
            (OPERANDS, "silu"),
            (("weight", "bias", "channel_bias"), "silu"),
            (("weight", "bias"), "identity"),
        )
    ),
    *(
        Case(shape=shape, layout=layout, dtype=dtype)
        for shape, dtype in (
            *((name, "fp32") for name in SHAPES if name != "vectors"),
            ("odd", "bf16"),
            ("wide", "fp16"),
            ("large group", "bf16"),
            ("one element", "fp64"),
            ("odd", "fp64"),
        )
        for layout in ("contiguous", "channels_last")
        if not (shape == "3-D" and layout == "channels_last")
    ),
    *(
        Case(shape=shape, layout=layout, values=values, dtype=dtype, operands=("weight", "bias"))
        for shape in ("odd", "large group")
        for layout in ("contiguous", "channels_last")
        for values, dtype in (
            ("constant", "fp32"),
            ("constant", "bf16"),
            ("mean 1e4", "fp32"),
            ("std 1000", "fp16"),
        )
    ),
    *(
        Case(shape="odd", layout=layout, dtype=dtype)
        for layout in ("sliced", "sliced channels_last", "expanded", "misaligned")
        for dtype in ("fp32", "bf16")
    ),
    *(
        Case(layout=layout, dtype=dtype, operand_dtype=operand_dtype, chunked=True)
        for layout in ("contiguous", "channels_last")
        for dtype, operand_dtype in (
            ("bf16", "bf16"),
            ("fp16", "fp16"),
            ("fp16", "bf16"),
            ("fp32", "fp64"),
            ("bf16", "fp32"),
        )
    ),
    *(Case(shape="odd", operands=operands) for operands in ((), ("weight",), ("bias", "scale"))),
    Case(operands=("scale", "shift"), activation="identity", chunked=True),
]
GRADIENT_CASES = [c for c in CASES if c.layout != "expanded"]


def values(case: Case, generator: torch.Generator) -> Tensor:
    shape = SHAPES[case.shape][0]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {
        "normal": 2 * noise + 0.5,
        "constant": torch.full(shape, 3.140625, dtype=torch.float64),
        "mean 1e4": 1e4 + noise,
        "std 1000": 1000 * noise,
    }[case.values]


def arguments(case: Case) -> dict:
    """The raw operator's arguments."""
    generator = torch.Generator().manual_seed(0)
    x = arrange(values(case, generator).to(FLOATS[case.dtype]), case.layout)
    batch, channels = x.shape[:2]
    dtype = FLOATS[case.operand_dtype]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    time = randn(batch, 2 * channels)
    if case.chunked:
        scale, shift = time.chunk(2, dim=1)
    else:
        scale, shift = (half.contiguous() for half in time.chunk(2, dim=1))
    operands = {
        "weight": randn(channels),
        "bias": randn(channels),
        "channel_bias": randn(batch, channels),
        "scale": scale,
        "shift": shift,
    }
    operands = {k: v if k in case.operands else None for k, v in operands.items()}
    return {
        "x": x,
        "num_groups": SHAPES[case.shape][1],
        "weight": operands["weight"],
        "bias": operands["bias"],
        "eps": 1e-5,
        "channel_bias": operands["channel_bias"],
        "scale": operands["scale"],
        "shift": operands["shift"],
        "activation": ACTIVATIONS.index(case.activation),
    }


def grad_output(case: Case, x: Tensor) -> Tensor:
    """Contiguous, whatever the layout of x: kernels have to bring it into x's."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def operations(args: dict) -> int:
    """Roundings: of the sums over a group (signs are random) and of the formula."""
    x = args["x"]
    group = x.shape[1:].numel() // args["num_groups"]
    return 24 + 2 * math.isqrt(group)


class Exact:
    """Results in float64, and magnitudes: what an error of one unit roundoff each is relative to.

    An error e of h = x + channel_bias, which is of the size of u max |h|, goes into h_hat as
    e rstd, and through the variance as e rstd |h_hat|; into z times gamma = weight (1 + scale);
    into act(z) times at most 1.1 and into act'(z) times at most 0.5. The backward formula is then
    taken with absolute values.
    """

    def __init__(self, args: dict) -> None:
        self.args = {
            k: v.detach().double() if isinstance(v, Tensor) else v for k, v in args.items()
        }
        a = self.args
        x = a["x"] = a["x"].contiguous()
        self.activation = ACTIVATIONS[a["activation"]]
        batch, channels = x.shape[:2]
        mean, rstd = group_statistics(x, a["num_groups"], a["eps"], a["channel_bias"])
        self.mean, self.rstd = mean, rstd

        def operand(name: str, neutral: float) -> Tensor:
            if a[name] is None:
                return torch.full((batch, channels, 1), neutral, dtype=torch.float64)
            return a[name].expand(batch, channels)[..., None]

        self.rstd_c = self.per_channel(rstd)
        self.factor, self.bias = 1 + operand("scale", 0), operand("bias", 0)
        self.weight = operand("weight", 1)
        self.gamma = self.weight * self.factor
        added = operand("channel_bias", 0)
        h = x.flatten(2) + added
        h_hat = (h - self.per_channel(mean)) * self.rstd_c
        largest = self.grouped(x.flatten(2).abs() + added.abs()).amax((2, 3))
        h_error = self.per_channel(largest) * self.rstd_c * (1 + h_hat.abs())
        self.h_size = h_hat.abs() + h_error
        affine = (self.bias * self.factor).abs() + operand("shift", 0).abs()
        self.z_size = self.gamma.abs() * self.h_size + affine

    def per_channel(self, groups: Tensor) -> Tensor:
        repeats = self.args["x"].shape[1] // self.args["num_groups"]
        return groups.repeat_interleave(repeats, dim=1)[..., None]

    def grouped(self, values: Tensor) -> Tensor:
        groups = self.args["num_groups"]
        return values.unflatten(1, (groups, values.shape[1] // groups))

    def statistics(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """mean and rstd, each with its magnitude."""
        h_error = self.grouped(self.h_size).amax((2, 3))
        return (self.mean, h_error / self.rstd), (self.rstd, self.rstd * h_error)

    def forward(self) -> tuple[Tensor, Tensor]:
        a = self.args
        y = reference.group_norm_silu(*list(a.values())[:-1], self.activation)
        return y, (1.1 * self.z_size).reshape(y.shape)

    def backward(self, grad: Tensor, names: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        a = self.args
        inputs = {name: a[name].clone().requires_grad_() for name in names}
        y = reference.group_norm_silu(*list((a | inputs).values())[:-1], self.activation)
        found = torch.autograd.grad(y, list(inputs.values()), grad.double())
        magnitudes = self._gradient_magnitudes(grad.double().flatten(2).abs())
        return {
            name: (gradient, magnitudes[name].reshape(gradient.shape))
            for name, gradient in zip(names, found, strict=True)
        }

    def _gradient_magnitudes(self, grad: Tensor) -> dict[str, Tensor]:
        dz = grad * (1.1 + 0.5 * self.z_size) if self.activation == "silu" else grad
        gamma, h_size = self.gamma.abs(), self.h_size

        def group_mean(per_element: Tensor) -> Tensor:
            return self.per_channel(self.grouped(per_element).mean((2, 3)))

        dx = gamma * dz + group_mean(gamma * dz) + h_size * group_mean(gamma * dz * h_size)
        dx = dx * self.rstd_c * (1 + h_size)
        s0, s1 = dz.sum(2, keepdim=True), (dz * h_size).sum(2, keepdim=True)
        return {
            "x": dx,
            "weight": (self.factor.abs() * s1).sum(0),
            "bias": (self.factor.abs() * s0).sum(0),
            "channel_bias": dx.sum(2),
            "scale": self.weight.abs() * s1 + self.bias.abs() * s0,
            "shift": s0,
        }
