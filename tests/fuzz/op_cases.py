"""One random call of one op: right against float64, or refused with a word about the argument."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from op_harness import exact, group_norm_silu, inputs, sampler_step, vlb_terms_cases
from torch import Tensor

import fastdiff
from fastdiff import reference
from fastdiff.diffusion.step_tables import VARIANCES
from fastdiff.ops._sampler_step import DDIM, DDPM
from fastdiff.reference.step_columns import PREDICTIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = tuple(exact.PUBLIC)
REFUSALS = (TypeError, ValueError, IndexError, RuntimeError)
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 16, 33)


def draw_shape(numbers: random.Random, dims: tuple[int, int]) -> tuple[int, ...]:
    """(B, C, ...) of at most some thousand elements, rarely more."""
    largest = 70_000 if numbers.random() < 0.02 else 4_000
    while True:
        rest = [numbers.choice(SIZES) for _ in range(numbers.randint(*dims))]
        shape = (numbers.choice((0, 1, 1, 2, 3, 5)), numbers.choice((1, 2, 3, 4, 8, 12, 40)), *rest)
        if torch.Size(shape).numel() <= largest:
            return shape


def draw_arguments(numbers: random.Random, op: str) -> dict[str, Any]:
    """The raw operator's arguments, in float32 and contiguous."""
    seed, flag = numbers.randrange(1 << 30), lambda: numbers.random() < 0.5
    generator = torch.Generator().manual_seed(seed)
    shape = draw_shape(numbers, (1, 3) if op == "group_norm_silu" else (0, 3))
    mode = numbers.choice(("given", "given", "seed", "keys"))
    if op == "group_norm_silu":
        groups = numbers.choice([g for g in range(1, shape[1] + 1) if shape[1] % g == 0])
        group_norm_silu.SHAPES["fuzz"] = shape, groups
        operands = tuple(name for name in group_norm_silu.OPERANDS if flag())
        activation = numbers.choice(("silu", "identity"))
        case = group_norm_silu.Case("fuzz", operands=operands, activation=activation)
        return group_norm_silu.arguments(case)
    inputs.SHAPES["fuzz"] = shape
    prediction = numbers.choice(PREDICTIONS)
    if op == "vlb_terms":
        variance = numbers.choice(VARIANCES)
        t = tuple(numbers.choice((0, 1, 37, 500, 999)) for _ in range(5))
        case = vlb_terms_cases.Case(
            *("fuzz", "contiguous", "fp32", None, mode, prediction, variance, flag(), flag(), t)
        )
        return vlb_terms_cases.arguments(case)
    if op in (DDIM, DDPM):
        learned = flag()
        if op == DDIM and numbers.random() < 0.3:
            mode = "none"
        case = sampler_step.Case(
            *("fuzz", "contiguous", "fp32", None, prediction, flag(), learned),
            *(learned if op == DDPM else flag(), flag(), mode, None, flag()),
        )
        return sampler_step.arguments(op, case, seed)
    batch = shape[0]
    noise = {
        "noise": torch.randn(shape, generator=generator) if mode == "given" else None,
        "keys": reference.sample_keys(seed, batch) if mode == "keys" else None,
        "seed": numbers.randrange(-(1 << 63), 1 << 63) if mode == "seed" else None,
        "stream": numbers.randrange(-(1 << 63), 1 << 63),
    }
    if op == "eps_loss":
        return {
            "prediction": torch.randn(shape, generator=generator),
            **noise,
            "weight": torch.rand(batch, generator=generator) if flag() else None,
            "reduction": numbers.randrange(3),
            "kind": numbers.randrange(3),
        }
    a, b = inputs.tables()
    flips = torch.randint(2, (batch,), generator=generator).bool() if flag() else None
    return {
        "x0": torch.rand(shape, generator=generator) * 2 - 1,
        "t": torch.randint(inputs.T, (batch,), generator=generator),
        "sqrt_alpha_bar": a,
        "sqrt_one_minus_alpha_bar": b,
        **noise,
        "flip": flips,
        "dtype": numbers.choice((None, None, *FLOATS)),
    }


def draw_dtypes(numbers: random.Random, op: str, args: dict[str, Any]) -> dict[str, Any]:
    found = dict(args)
    same = numbers.choice(FLOATS)
    for name, x in args.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        wide_only = name == "table" or "alpha" in name or (op == "eps_loss" and name == "weight")
        if wide_only:
            found[name] = x.double() if numbers.random() < 0.1 else x
        elif op == "q_sample" and name == "x0" and numbers.random() < 0.2:
            found[name] = ((x + 1) * 127.5).round().to(torch.uint8)
        else:
            found[name] = x.to(same if numbers.random() < 0.6 else numbers.choice(FLOATS))
    return found


def draw_layout(numbers: random.Random, x: Tensor) -> Tensor:
    """The same values with other strides, another offset or a lazy sign."""
    kind = numbers.choice(("plain", "plain", "last", "permuted", "sliced", "offset", "negated"))
    if kind == "last" and x.dim() in (4, 5):
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=last)
    if kind == "permuted" and x.dim() > 1:
        order = numbers.sample(range(x.dim()), x.dim())
        back = [order.index(d) for d in range(x.dim())]
        return x.permute(order).contiguous().permute(back)
    if kind == "sliced" and x.dim():
        steps = [numbers.randint(1, 3) for _ in x.shape]
        sizes = [s * k + numbers.randint(0, 2) for s, k in zip(x.shape, steps, strict=True)]
        base = torch.zeros(sizes).to(x.dtype)
        view = base[tuple(slice(None, s * k, k) for s, k in zip(x.shape, steps, strict=True))]
        return view.copy_(x)
    if kind == "offset":
        shift = numbers.randint(1, 5)
        flat = torch.zeros(x.numel() + shift).to(x.dtype)
        return flat[shift:].view(x.shape).copy_(x)
    if kind == "negated" and x.is_floating_point():
        return torch._neg_view(-x)
    return x


def draw_expanded(numbers: random.Random, args: dict[str, Any]) -> dict[str, Any]:
    """A dimension of one operand without a stride: the same values again and again."""
    tensors = [k for k, x in args.items() if isinstance(x, Tensor) and x.dim() and x.numel()]
    name = numbers.choice(tensors) if tensors and numbers.random() < 0.15 else None
    if name is None:
        return args
    x = args[name]
    d = numbers.randrange(x.dim())
    return args | {name: x.narrow(d, 0, 1).expand(x.shape)}


def spoil(numbers: random.Random, op: str, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The arguments with one that nothing can be done with, and its name."""
    names = [name for name, x in args.items() if isinstance(x, Tensor)]
    name = numbers.choice(names)
    x = args[name]
    kinds = ["dtype", "list", "numpy", "text"]
    # Of some ops the first operand has no other one that it has to fit to.
    if name != next(iter(args)) or op in ("vlb_terms", DDIM, DDPM):
        kinds += ["dims", "size", "meta"]
    kinds += ["sparse"] if x.numel() else []
    kinds += ["range"] if name in ("t", "step") and x.numel() else []
    required = name not in ("noise", "keys", "flip", "uncond", *group_norm_silu.OPERANDS)
    kinds += ["none"] if required else []
    kind = numbers.choice(kinds)
    if kind == "size":
        d = numbers.randrange(x.dim())
        if "alpha" in name or (name == "table" and d == 0):
            kind = "list"  # a table of another length may be one
        elif name == "model_output" and d == 1 and op == DDIM:
            kind = "text"  # twice the channels are a model of learned variance
    spoiled = {
        "dtype": lambda: torch.zeros(x.shape, dtype=torch.complex64),
        "dims": lambda: x[None] if x.dim() else x.reshape(1, 1),
        "list": lambda: [1.0],
        "numpy": lambda: np.zeros(tuple(x.shape)),
        "text": lambda: "x",
        "size": lambda: torch.zeros([s + (k == d) for k, s in enumerate(x.shape)]).to(x.dtype),
        "meta": lambda: x.to("meta"),
        "sparse": lambda: x.contiguous().resolve_neg().to_sparse(),
        "range": lambda: x + numbers.choice((-(1 << 62), -2000, 2000, 1 << 62)),
        "none": lambda: None,
    }[kind]()
    return f"{name} ({kind})", args | {name: spoiled}


def call(way: str, op: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    if way == "raw":
        found = getattr(torch.ops.fastdiff, op).default(*args.values())
    elif way == "reference":
        with fastdiff.use_backend("reference"):
            found = exact.PUBLIC[op](args)
    else:
        found = exact.PUBLIC[op](args)
    found = found if isinstance(found, tuple) else (found,)
    return (torch.stack(found),) if op == "vlb_terms" and way != "raw" else found


def kernels_take(op: str, args: dict[str, Any]) -> bool:
    """Whether the raw CPU operator has a kernel for these dtypes."""
    if any(args[k].dtype == torch.float64 for k in args if k == "table" or "alpha" in k):
        return False
    wide = exact.compute_dtype(op, args) == torch.float64
    made = args.get("seed") is not None or args.get("keys") is not None
    if op == "vlb_terms":
        return not wide
    if op == "q_sample" and args["x0"].dtype == torch.uint8:
        return not wide
    if op == "eps_loss":
        return not wide or args["noise"] is not None
    return not wide or not made


def check_right(op: str, way: str, args: dict[str, Any]) -> None:
    names = exact.differentiable(op, args)
    args = args | {name: args[name].detach().requires_grad_() for name in names}
    found = call(way, op, args)
    main = next(iter(args.values()))
    if main.numel() == 0:  # a mean over nothing is NaN
        return
    wanted = exact.outputs(op, {k: _plain(x) for k, x in args.items()})
    for actual, value in zip(found, wanted, strict=False):
        value.check(actual.detach())
    if names and found[0].requires_grad:
        grad = torch.linspace(0.5, 1.5, found[0].numel()).reshape(found[0].shape)
        grad = grad.to(found[0].dtype)
        got = torch.autograd.grad(found[0], [args[name] for name in names], grad)
        exact_gradients = exact.gradients(op, {k: _plain(x) for k, x in args.items()}, grad)
        for name, actual in zip(names, got, strict=True):
            assert actual.dtype == args[name].dtype
            exact_gradients[name].check(actual)


def _plain(x: Any) -> Any:
    return x.detach().contiguous().resolve_neg() if isinstance(x, Tensor) else x


def name_of_main(args: dict[str, Any]) -> str:
    return f"{next(iter(args))} "


def refusal(way: str, op: str, args: dict[str, Any], description: str) -> str:
    """The message of the error that this call raises."""
    try:
        call(way, op, args)
    except REFUSALS as error:
        return str(error)
    raise AssertionError(f"{description} was accepted")


def one_call(numbers: random.Random) -> None:
    op = numbers.choice(OPS)
    way = numbers.choice(("public", "public", "raw", "raw", "reference"))
    args = draw_dtypes(numbers, op, draw_arguments(numbers, op))
    args = draw_expanded(numbers, args)
    args = {k: draw_layout(numbers, x) if isinstance(x, Tensor) else x for k, x in args.items()}
    description = f"{way} {op}: " + ", ".join(
        f"{k} {x.dtype} {tuple(x.shape)} {x.stride()}" if isinstance(x, Tensor) else f"{k} {x}"
        for k, x in args.items()
    )
    if numbers.random() < 0.3:
        what, args = spoil(numbers, op, args)
        description = f"bad {what} of {description}"
        message = refusal(way, op, args, description)
        named = (what.split()[0], "seed")
        if way == "raw":  # the dispatcher speaks of the schema
            named = (op, "fastdiff::", "arguments are on")
        if name_of_main(args) in what or "(meta)" in what:  # which of two is the wrong one?
            named = (op, "arguments are on")
        if way == "raw" and "(none)" in what:
            named = ("",)  # an undefined tensor, of which the stable ABI says nothing better
        assert any(word in message for word in named), f"{description}: {message}"
    elif way == "raw" and not kernels_take(op, args):
        message = refusal(way, op, args, description)
        assert op in message, f"{description}: {message}"
    else:
        try:
            check_right(op, way, args)
        except Exception as error:
            raise AssertionError(description) from error
