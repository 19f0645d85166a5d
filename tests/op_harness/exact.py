"""What every op computes, in float64, and what rounding may do to it, for operands of any dtypes.

`outputs` and `gradients` take the arguments of a raw operator by name; `PUBLIC` calls the public
function with them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import ops, reference
from fastdiff.ops import _sampler_step
from fastdiff.ops._sampler_step import DDIM, DDPM, Arguments
from fastdiff.ops.vlb_terms import Arguments as VlbArguments
from fastdiff.ops.vlb_terms import _reference as _vlb_reference
from fastdiff.reference.eps_loss import LOSS_KINDS, REDUCTIONS, loss_terms
from fastdiff.reference.group_norm_silu import ACTIVATIONS
from fastdiff.reference.step_columns import PREDICTIONS, StepColumn, StepRows

from . import group_norm_silu, sampler_step, vlb_terms_cases
from .tolerance import assert_close


class Exact(NamedTuple):
    """A result in float64, the size of the terms behind it, and how often it was rounded.

    `compute` is the dtype of the arithmetic; elements where `decided` is false depend on how a
    rounded number compares with a limit.
    """

    value: Tensor
    magnitude: Tensor
    operations: int
    compute: torch.dtype
    decided: Tensor | None = None

    def check(self, actual: Tensor, implementation: str = "") -> None:
        value, magnitude = self.value, self.magnitude.expand(self.value.shape)
        assert actual.shape == value.shape
        # What the dtype cannot hold is infinite; close to that, rounding decides.
        holds = value.abs() < 0.99 * torch.finfo(actual.dtype).max
        judged = holds if self.decided is None else holds & self.decided
        actual, value, magnitude = (x[judged] for x in (actual, value, magnitude))
        assert_close(
            actual,
            value,
            magnitude=magnitude,
            operations=self.operations,
            implementation=implementation,
            compute=self.compute,
        )


def compute_dtype(op: str, args: dict[str, Any]) -> torch.dtype:
    """float64 if an operand that decides about it is, else float32."""
    deciding = {
        "q_sample": ("x0", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"),
        "eps_loss": ("prediction",),
        "vlb_terms": ("x0", "x_t", "model_output"),
        DDIM: ("x_t",),
        DDPM: ("x_t",),
        "group_norm_silu": ("x",),
    }[op]
    dtypes = [args[name].dtype for name in deciding]
    if op == "q_sample":
        dtypes.append(args["dtype"])
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _noise(args: dict[str, Any], like: Tensor) -> Tensor | None:
    keys = args["keys"]
    if args["seed"] is not None:
        keys = reference.sample_keys(args["seed"], len(like))
    if keys is not None:
        return reference.normals(keys, like.shape, args["stream"], torch.float64)
    return None if args["noise"] is None else args["noise"].double()


def _per_sample(x: Tensor, like: Tensor) -> Tensor:
    return x.double().reshape(-1, *[1] * (like.dim() - 1))


# A normal is right to four ulps.
_NORMAL = 8


def _q_sample(args: dict[str, Any]) -> list[tuple[Tensor, Tensor, int]]:
    a, b, t = args["sqrt_alpha_bar"], args["sqrt_one_minus_alpha_bar"], args["t"]
    x0 = args["x0"]
    x = (2 * x0.double() - 255) / 255 if x0.dtype == torch.uint8 else x0.double()
    if args["flip"] is not None:
        x = torch.where(args["flip"].reshape(-1, *[1] * (x.dim() - 1)), x.flip(-1), x)
    signal = _per_sample(a[t], x) * x
    noise = _noise(args, x0)
    added = torch.zeros_like(signal) if noise is None else _per_sample(b[t], x) * noise
    # Operands in the dtype of the arithmetic (2), pixels of levels (2), tables, products, a sum.
    return [(signal + added, signal.abs() + added.abs(), 2 + 2 + 5 + _NORMAL)]


def _eps_loss_terms(args: dict[str, Any]) -> list[tuple[Tensor, Tensor, int]]:
    p = args["prediction"].double()
    n = _noise(args, p)
    w = torch.ones(len(p)) if args["weight"] is None else args["weight"]
    w = w.double()
    kind, reduction = LOSS_KINDS[args["kind"]], REDUCTIONS[args["reduction"]]
    size = p.abs() + n.abs()
    terms = loss_terms(p - n, kind).reshape(len(p), -1)
    sizes = (size.square() if kind == "mse" else size + 1).reshape(len(p), -1)

    def reduced(x: Tensor, weight: Tensor) -> Tensor:
        samples = weight * (x.sum(1) if reduction == "sum" else x.mean(1))
        return {"none": samples, "mean": samples.mean(), "sum": samples.sum()}[reduction]

    # Operands (2), error (twice: it is squared), term (3), weight and scale (3), normals (twice),
    # and the sums: chains of at most 64 elements and of all samples, and trees.
    operations = 2 + 2 + 3 + 3 + 2 * _NORMAL + 64 + len(p) + 20
    return [(reduced(terms, w), reduced(sizes, w.abs()), operations)]


def _steps(op: str, args: dict[str, Any]) -> list[tuple[Tensor, Tensor, int]]:
    outputs = zip(sampler_step.expected(op, args), sampler_step.magnitudes(op, args), strict=True)
    operations = sampler_step.X_S_OPERATIONS + _NORMAL + 3, sampler_step.X0_OPERATIONS + 3
    found = [(*output, n) for output, n in zip(outputs, operations, strict=True)]
    return found if args["return_pred_x0"] else found[:1]


def _vlb(args: dict[str, Any]) -> list[tuple[Tensor, Tensor, int]]:
    exact = _vlb_reference(VlbArguments(**vlb_terms_cases.double_arguments(args)))
    sizes = vlb_terms_cases.Magnitudes(args, torch.zeros(exact.shape))
    magnitude = torch.stack([sizes.kl, sizes.x0_mse, sizes.eps_mse])
    # tests/ops/test_vlb_terms.py says what these are; three for converted operands.
    return [(exact, magnitude, 3 + 4 + 3 + 40 + 16 + 64 + len(args["x_t"]) + 20)]


def _group_norm(args: dict[str, Any]) -> list[tuple[Tensor, Tensor, int]]:
    exact = group_norm_silu.Exact(args)
    return [(*exact.forward(), group_norm_silu.operations(args))]


def outputs(op: str, args: dict[str, Any]) -> list[Exact]:
    """The outputs of the public function."""
    compute = compute_dtype(op, args)
    with torch.no_grad():
        found = {
            "q_sample": lambda: _q_sample(args),
            "eps_loss": lambda: _eps_loss_terms(args),
            "vlb_terms": lambda: _vlb(args),
            DDIM: lambda: _steps(op, args),
            DDPM: lambda: _steps(op, args),
            "group_norm_silu": lambda: _group_norm(args),
        }[op]()
    return [Exact(*f, compute) for f in found]


DIFFERENTIABLE = {
    "q_sample": ("x0", "noise"),
    "eps_loss": ("prediction", "noise", "weight"),
    "vlb_terms": ("model_output",),
    DDIM: ("x_t", "model_output", "uncond", "noise"),
    DDPM: ("x_t", "model_output", "uncond", "noise"),
    "group_norm_silu": ("x", *group_norm_silu.OPERANDS),
}


def differentiable(op: str, args: dict[str, Any]) -> tuple[str, ...]:
    """The operands of this call that have a gradient."""
    return tuple(
        name
        for name in DIFFERENTIABLE[op]
        if args[name] is not None and args[name].dtype.is_floating_point
    )


def gradients(op: str, args: dict[str, Any], grad: Tensor) -> dict[str, Exact]:
    """The gradients for the gradient `grad` of the first output (of vlb_terms: of all three)."""
    compute = compute_dtype(op, args)
    names = differentiable(op, args)
    grad = grad.detach().double()
    if op == "q_sample":
        return _q_sample_gradients(args, grad, names, compute)
    if op == "eps_loss":
        return _eps_loss_gradients(args, grad, names, compute)
    if op == "vlb_terms":
        return _vlb_gradients(args, grad, compute)
    if op in (DDIM, DDPM):
        return _step_gradients(op, args, grad, names, compute)
    exact = group_norm_silu.Exact(args).backward(grad, names)
    x = args["x"]
    # Sums over a group and, of weight and bias, over all samples.
    chain = math.isqrt(x.numel()) + 1
    return {
        name: Exact(*found, 48 + 2 * group_norm_silu.operations(args) + chain, compute)
        for name, found in exact.items()
    }


def _q_sample_gradients(
    args: dict[str, Any], grad: Tensor, names: tuple[str, ...], compute: torch.dtype
) -> dict[str, Exact]:
    a, b, t = args["sqrt_alpha_bar"], args["sqrt_one_minus_alpha_bar"], args["t"]
    mirrored = grad
    if args["flip"] is not None:
        flip = args["flip"].reshape(-1, *[1] * (grad.dim() - 1))
        mirrored = torch.where(flip, grad.flip(-1), grad)
    values = {"x0": _per_sample(a[t], grad) * mirrored, "noise": _per_sample(b[t], grad) * grad}
    return {name: Exact(values[name], values[name].abs(), 3, compute) for name in names}


def _eps_loss_gradients(
    args: dict[str, Any], grad: Tensor, names: tuple[str, ...], compute: torch.dtype
) -> dict[str, Exact]:
    p = args["prediction"].double()
    n = _noise(args, p)
    w = torch.ones(len(p)) if args["weight"] is None else args["weight"]
    inputs = {"prediction": p, "noise": n, "weight": w.double()}
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    p, n, w = inputs.values()
    kind, reduction = LOSS_KINDS[args["kind"]], REDUCTIONS[args["reduction"]]
    loss = reference.eps_loss(p, n, weight=w, reduction=reduction, kind=kind)
    found = torch.autograd.grad(loss, [inputs[name] for name in names], grad)
    with torch.no_grad():
        error = p - n
        size = p.abs() + n.abs()
        # The slope is 2 d, +-1, or d cut at 1: an error of d, of the size of |p| + |n|, passes. At
        # the corners of l1 and Huber's loss a rounded d may be on the other side.
        slope = 2 * size if kind == "mse" else size.clamp(min=1)
        corner = {"mse": math.inf, "l1": 0.0, "huber": 1.0}[kind]
        decided = (error.abs() - corner).abs() > 64 * torch.finfo(compute).eps * size.clamp(min=1)
        elements = max(1, p[0].numel() if len(p) else 1)
        scale = {"none": 1 / elements, "sum": 1.0, "mean": 1 / max(1, elements * len(p))}[reduction]
        factor = _per_sample((grad * w).expand(len(p)), p).abs() * scale
        sizes = {"prediction": factor * slope, "noise": factor * slope}
        (losses,) = _eps_loss_terms(args | {"weight": None, "reduction": 0})
        repeats = scale * elements
        sizes["weight"] = losses[1] * grad.abs() * repeats
    results = {}
    for name, value in zip(names, found, strict=True):
        if name == "weight":
            results[name] = Exact(value, sizes[name], losses[2] + 3, compute)
        else:
            results[name] = Exact(value, sizes[name], 8 + _NORMAL, compute, decided)
    return results


def _clip_decided(op: str, args: dict[str, Any], compute: torch.dtype) -> Tensor:
    """Where rounding cannot move x0 over the limits of the clip."""
    unclipped = args | {"clip": False, "return_pred_x0": True}
    _, x0 = sampler_step.expected(op, unclipped)
    _, size = sampler_step.magnitudes(op, unclipped)
    return (x0.abs() - 1).abs() > 16 * torch.finfo(compute).eps * size


def _step_gradients(
    op: str, args: dict[str, Any], grad: Tensor, names: tuple[str, ...], compute: torch.dtype
) -> dict[str, Exact]:
    wide = sampler_step.widened(args)
    inputs = {name: getattr(wide, name).detach().clone().requires_grad_() for name in names}
    x_s, _ = _sampler_step.run_reference(op, wide._replace(**inputs))
    found = torch.autograd.grad(x_s, list(inputs.values()), grad, allow_unused=True)
    # Of what is affine with positive coefficients the magnitude is the derivative of the sum of
    # absolute values by absolute values; the exponential of the variance channels is apart.
    positive = {  # and not zero, where |x| has no derivative
        name: getattr(wide, name).detach().abs().clamp(min=1e-30).requires_grad_() for name in names
    }
    fixed = wide._asdict() | positive
    learned = op == DDPM and args["flag"]
    channels = wide.x_t.shape[1]
    if learned:
        variance = wide.model_output[:, channels:].detach()
        mean = positive["model_output"][:, :channels]
        fixed["model_output"] = torch.cat([mean, variance], 1)
    x_s_size, _ = sampler_step.magnitudes(op, fixed)
    sizes = torch.autograd.grad(x_s_size, list(positive.values()), grad.abs(), allow_unused=True)
    decided = _clip_decided(op, args, compute) if args["clip"] else torch.ones_like(grad).bool()
    results = {}
    for name, value, size in zip(names, found, sizes, strict=True):
        of_mean = decided
        like = inputs[name].detach()
        value = torch.zeros_like(like) if value is None else value
        size = torch.zeros_like(like) if size is None else size
        if like.shape[1] != channels:
            of_mean = torch.cat([decided, torch.ones_like(decided)], 1)
            if learned and name == "model_output":
                row = StepRows(wide.table, wide.step, wide.x_t)
                half = 0.5 * row[StepColumn.LOG_VARIANCE_SLOPE]
                exponent = half * variance
                noise = _noise(args, wide.x_t).abs()
                sigma = row[StepColumn.SIGMA] * exponent.exp() * (1 + exponent.abs())
                size[:, channels:] = grad.abs() * sigma * half.abs() * noise
        operations = sampler_step.X_S_OPERATIONS + _NORMAL + 4
        results[name] = Exact(value, size, operations, compute, of_mean)
    return results


def _vlb_gradients(args: dict[str, Any], grad: Tensor, compute: torch.dtype) -> dict[str, Exact]:
    exact = vlb_terms_cases.double_arguments(args)
    output = exact["model_output"] = exact["model_output"].detach().clone().requires_grad_()
    terms = _vlb_reference(VlbArguments(**exact))
    value = torch.zeros_like(output)
    if terms.requires_grad:
        (value,) = torch.autograd.grad(terms, output, grad)
    with torch.no_grad():
        sizes = vlb_terms_cases.Magnitudes(args, grad)
        size = torch.cat([sizes.output, sizes.v], 1) if args["learned"] else sizes.output
        decided = torch.ones_like(sizes.output).bool()
        if args["clip"]:
            step = Arguments(
                *(args["x_t"], args["model_output"], args["t"], args["table"]),
                *(args["prediction"], False, args["learned"], None, 1.0, args["noise"]),
                *(args["keys"], args["seed"], args["stream"], True),
            )
            decided = _clip_decided(DDPM, step._asdict(), compute)
        if args["learned"]:
            decided = torch.cat([decided, torch.ones_like(decided)], 1)
    # tests/ops/test_vlb_terms.py counts 80; four for operands.
    return {"model_output": Exact(value, size, 84, compute, decided)}


def _seed(args: dict[str, Any]) -> Any:
    return args["seed"] if args["keys"] is None else args["keys"]


def _public_q_sample(a: dict[str, Any]) -> Tensor:
    return ops.q_sample(
        *(a["x0"], a["t"], a["sqrt_alpha_bar"], a["sqrt_one_minus_alpha_bar"], a["noise"]),
        seed=_seed(a),
        stream=a["stream"],
        flip=a["flip"],
        dtype=a["dtype"],
    )


def _public_eps_loss(a: dict[str, Any]) -> Tensor:
    return ops.eps_loss(
        *(a["prediction"], a["noise"]),
        seed=_seed(a),
        stream=a["stream"],
        weight=a["weight"],
        reduction=REDUCTIONS[a["reduction"]],
        kind=LOSS_KINDS[a["kind"]],
    )


def _public_vlb_terms(a: dict[str, Any]) -> tuple[Tensor, ...]:
    return ops.vlb_terms(
        *(a["x0"], a["x_t"], a["model_output"], a["t"], a["table"]),
        noise=a["noise"],
        seed=_seed(a),
        stream=a["stream"],
        prediction=PREDICTIONS[a["prediction"]],
        variance="learned_range" if a["learned"] else "fixed_large",
        clip=a["clip"],
        detach_mean=a["detach_mean"],
    )


def _public_step(op: str, a: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    flag = {"learned_range" if op == DDPM else "use_clipped_model_output": a["flag"]}
    return getattr(ops, op)(
        *(a["x_t"], a["model_output"], a["step"], a["table"]),
        prediction=PREDICTIONS[a["prediction"]],
        clip=a["clip"],
        uncond=a["uncond"],
        guidance_scale=a["guidance_scale"],
        noise=a["noise"],
        seed=_seed(a),
        stream=a["stream"],
        return_pred_x0=a["return_pred_x0"],
        **flag,
    )


def _public_group_norm_silu(a: dict[str, Any]) -> Tensor:
    return ops.group_norm_silu(*list(a.values())[:-1], ACTIVATIONS[a["activation"]])


PUBLIC = {
    "q_sample": _public_q_sample,
    "eps_loss": _public_eps_loss,
    "vlb_terms": _public_vlb_terms,
    DDIM: lambda a: _public_step(DDIM, a),
    DDPM: lambda a: _public_step(DDPM, a),
    "group_norm_silu": _public_group_norm_silu,
}
