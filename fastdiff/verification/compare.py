"""One call on one backend against plain PyTorch in float64."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff._backends import use_backend
from fastdiff.verification.cases import Case, Inputs


@dataclass(frozen=True)
class Row:
    """The worst element of one result."""

    op: str
    variant: str
    backend: str
    dtype: str
    layout: str
    result: str
    """"output" or "d <argument>"."""
    error: float
    """Largest |result - float64 reference|; infinite where the result is not finite."""
    relative: float
    """The error over the largest value of the reference."""
    share: float
    """The error over the bound at that element; above 1 it fails."""

    @property
    def passed(self) -> bool:
        return self.share <= 1

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def verify_case(
    case: Case, backend: str, dtype: torch.dtype, layout: str, device: torch.device
) -> list[Row]:
    """Forward, and gradients with a random gradient of the outputs.

    A result passes if every element is within the float32 roundings of its arithmetic, relative to
    the largest value of the result, plus one rounding to its own dtype.
    """
    arguments = case.arguments(Inputs(dtype, layout, device))
    with use_backend(backend):
        results = _evaluate(case, arguments)
    in_double = {k: _double(v) for k, v in arguments.items()} | dict(case.in_double)
    with use_backend("reference"):
        expected = _evaluate(case, in_double)
    rows = []
    for name, value in results.items():
        error, relative, share = _distance(value, expected[name], case.operations)
        rows.append(
            Row(case.op, case.variant, backend, _short(dtype), layout, name, error, relative, share)
        )
    return rows


def _evaluate(case: Case, arguments: dict[str, Any]) -> dict[str, Tensor]:
    arguments = dict(arguments)
    for name in case.differentiable:
        arguments[name] = arguments[name].detach().requires_grad_()
    returned = case.function(**arguments)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    names = ("output",) if len(outputs) == 1 else [f"output {i}" for i in range(len(outputs))]
    results = {name: x.detach() for name, x in zip(names, outputs, strict=True)}
    if case.differentiable:
        inputs = [arguments[name] for name in case.differentiable]
        differentiated = [outputs[i] for i in case.outputs]
        gradient = _gradient_like(differentiated[0])
        # The second output's gradient is the first's mirrored: not the same.
        several = [gradient, gradient.flip(-1)][: len(differentiated)]
        gradients = torch.autograd.grad(differentiated, inputs, several)
        results |= {f"d {n}": g for n, g in zip(case.differentiable, gradients, strict=True)}
    return results


def _gradient_like(x: Tensor) -> Tensor:
    # bfloat16's values are float16's and float32's too, so all dtypes get the same gradient.
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(x.shape, generator=generator).to(torch.bfloat16)
    return gradient.to(x.device, x.dtype)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def _distance(value: Tensor, expected: Tensor, operations: int) -> tuple[float, float, float]:
    if value.numel() == 0:
        return 0.0, 0.0, 0.0
    value, dtype = value.double(), value.dtype
    largest = expected.abs().max()
    # A gradient is rounded where the op computed it, in float32, even if autograd passed it on.
    bound = operations * torch.finfo(torch.float32).eps / 2 * largest
    if dtype in (torch.float16, torch.bfloat16):
        bound = bound + torch.finfo(dtype).eps / 2 * (expected.abs() + bound)
        bound = bound + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (value - expected).abs()
    error = torch.where(value.isfinite(), error, torch.inf)
    share = torch.where(error == 0, 0.0, error / bound)
    return (
        float(error.max()),
        float(error.max() / largest.clamp(min=torch.finfo(torch.float64).tiny)),
        float(share.max()),
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
