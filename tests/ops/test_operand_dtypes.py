"""All combinations of the operands' dtypes, of all ops: right or refused, outputs and gradients.

The values are short binary fractions, which every dtype holds exactly, so that all combinations
have the same exact result. Only the dtypes that decide about the arithmetic change the bound.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_harness import available, evaluate, exact, implementation_params
from op_harness.inputs import arrange
from op_harness.raw_arguments import GENERATOR, arguments, fractions
from torch import Tensor

import fastdiff
from fastdiff.ops._sampler_step import DDIM, DDPM

F64 = torch.float64
INTEGERS = {"t": torch.int64, "step": torch.int64, "flip": torch.bool}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, F64)
OTHERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
          torch.uint16, torch.float8_e4m3fn)  # fmt: skip


OPS = ("q_sample", "eps_loss", "vlb_terms", DDIM, DDPM, "group_norm_silu")
WITHOUT = "without"  # no such operand; of noise: neither noise nor seed
SEED = "seed"


def choices(op: str) -> dict[str, tuple]:
    """What every operand may be: its dtypes, or none."""
    tables = (torch.float32, F64)
    if op == "q_sample":
        return {
            "x0": (torch.uint8, *FLOATS),
            "sqrt_alpha_bar": tables,
            "sqrt_one_minus_alpha_bar": tables,
            "noise": (*FLOATS, SEED),
            "dtype": (*FLOATS, WITHOUT),
        }
    if op == "eps_loss":
        return {
            "prediction": FLOATS,
            "noise": (*FLOATS, SEED),
            "weight": (*tables, WITHOUT),
        }
    if op == "vlb_terms":
        return {
            "x0": FLOATS,
            "x_t": FLOATS,
            "model_output": FLOATS,
            "table": tables,
            "noise": (*FLOATS, SEED),
        }
    if op in (DDIM, DDPM):
        return {
            "x_t": FLOATS,
            "model_output": FLOATS,
            "table": tables,
            "uncond": (*FLOATS, WITHOUT),
            "noise": (*FLOATS, SEED, *([WITHOUT] if op == DDIM else [])),
        }
    return {
        "x": FLOATS,
        **dict.fromkeys(("weight", "bias", "channel_bias", "scale", "shift"), (*FLOATS, WITHOUT)),
    }


def combinations(op: str) -> Iterator[dict[str, Any]]:
    given = choices(op)
    if op == "group_norm_silu":
        # The kernels take every operand by itself: all combinations of those with one shape.
        parts = [("x", "weight", "bias"), ("x", "channel_bias", "scale", "shift")]
    else:
        parts = [tuple(given)]
    for names in parts:
        for chosen in itertools.product(*(given[name] for name in names)):
            yield dict(zip(names, chosen, strict=True))


def pixels(x0: Tensor) -> Tensor:
    """The levels of uint8 images, with values of their own."""
    return (x0.abs() * 64 + 190).to(torch.uint8)


def with_dtypes(args: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    found = dict(args)
    for name, what in chosen.items():
        if what == SEED:
            found |= {"noise": None, "seed": 11}
        elif what == WITHOUT:
            found[name] = None
        elif name == "dtype":
            found[name] = what
        else:
            found[name] = pixels(args[name]) if what == torch.uint8 else args[name].to(what)
    return found


@functools.cache
def exact_outputs(op: str, uint8: bool, absent: frozenset[str]) -> tuple:
    """Outputs and gradients in float64 of a call whose operands are those of `arguments`."""
    chosen = dict.fromkeys(absent - {SEED}, WITHOUT)
    chosen |= {"noise": SEED} if SEED in absent else {}
    chosen |= {"x0": torch.uint8} if uint8 else {}
    args = with_dtypes(arguments(op), chosen)
    found = exact.outputs(op, args)
    grad = gradient_of(op, found[0].value)
    return found, grad, exact.gradients(op, args, grad)


def gradient_of(op: str, output: Tensor) -> Tensor:
    GENERATOR.manual_seed(1)
    return fractions(*output.shape)


def call(way: str, op: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    if way == "public":
        found = exact.PUBLIC[op](args)
    elif way == "raw":
        found = getattr(torch.ops.fastdiff, op).default(*args.values())
    else:
        with fastdiff.use_backend("reference"):
            found = exact.PUBLIC[op](args)
    found = found if isinstance(found, tuple) else (found,)
    if op == "vlb_terms" and way != "raw":
        return (torch.stack(found),)
    return found


def kernels_refuse(op: str, args: dict[str, Any]) -> bool:
    """Whether the op's one capability predicate says so."""
    name = {DDIM: "_sampler_step", DDPM: "_sampler_step"}.get(op, op)
    module = importlib.import_module(f"fastdiff.ops.{name}")
    names = {
        "q_sample": ("x0", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "noise", "dtype"),
        "eps_loss": ("prediction", "noise"),
        "vlb_terms": ("x0", "x_t", "model_output", "table", "noise"),
        DDIM: ("x_t", "table", "noise", "seed"),
        DDPM: ("x_t", "table", "noise", "seed"),
        "group_norm_silu": ("x",),
    }[op]
    predicate = getattr(module, "_unsupported", None) or module.unsupported
    return predicate(*(args[name] for name in names)) is not None


RESULT = {"q_sample": "x0", "vlb_terms": None, "eps_loss": None, DDIM: "x_t", DDPM: "x_t",
          "group_norm_silu": "x"}  # fmt: skip


def result_dtype(op: str, args: dict[str, Any]) -> torch.dtype:
    if args.get("dtype"):
        return args["dtype"]
    name = RESULT[op]
    if name is None:
        return exact.compute_dtype(op, args)
    return torch.float32 if args[name].dtype == torch.uint8 else args[name].dtype


def check(op: str, chosen: dict[str, Any], way: str, layout: str) -> None:
    args = with_dtypes(arguments_of(op, layout), chosen)
    refused = way == "raw" and kernels_refuse(op, args)
    names = () if refused else exact.differentiable(op, args)
    args |= {name: args[name].detach().requires_grad_() for name in names}
    if refused:
        with pytest.raises((RuntimeError, TypeError, ValueError), match=op):
            call(way, op, args)
        return
    found = call(way, op, args)
    absent = frozenset(SEED if what == SEED else name for name, what in chosen.items()
                       if what in (SEED, WITHOUT) and name != "dtype")  # fmt: skip
    uint8 = chosen.get("x0") == torch.uint8
    wanted, grad, gradients = exact_outputs(op, uint8, absent)
    compute = exact.compute_dtype(op, args)
    assert found[0].dtype == result_dtype(op, args)
    for actual, value in zip(found, wanted, strict=way != "raw"):
        value._replace(compute=compute).check(actual.detach())
    if not names:
        return
    got = torch.autograd.grad(found[0], [args[name] for name in names], grad.to(found[0].dtype))
    for name, actual in zip(names, got, strict=True):
        assert actual.dtype == args[name].dtype
        gradients[name]._replace(compute=compute).check(actual)


@functools.cache
def arguments_of(op: str, layout: str) -> dict[str, Any]:
    args = arguments(op)
    for name, x in args.items():
        if isinstance(x, Tensor) and x.dim() == 4:
            # The second operand in the other format: converted, and brought into the first one's.
            other = {"contiguous": "channels_last", "channels_last": "contiguous"}[layout]
            args[name] = arrange(x, other if name in ("noise", "model_output") else layout)
    return args


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("way", "layout"),
    [("public", "channels_last"), ("raw", "contiguous"), ("reference", "contiguous")],
)
def test_every_combination_cpu(way: str, layout: str, op: str) -> None:
    if way == "raw" and available("cpu") is not None:
        pytest.skip("the CPU library is not built")
    failures = {}
    count = 0
    for chosen in combinations(op):
        count += 1
        try:
            check(op, chosen, way, layout)
        except Exception as error:
            failures[str({k: str(v) for k, v in chosen.items()})] = f"{error!r}"[:300]
    assert not failures, f"{len(failures)} of {count}: " + "\n".join(
        f"{k}: {v}" for k, v in list(failures.items())[:10]
    )


def narrowed(args: dict[str, Any]) -> dict[str, Any]:
    """What is float64 in float32."""
    return {
        k: x.float() if isinstance(x, Tensor) and x.dtype == F64 else x for k, x in args.items()
    }


def allowed(op: str, name: str) -> tuple[torch.dtype, ...]:
    """The dtypes of a tensor that is an argument of a raw operator."""
    if name in INTEGERS:
        return (INTEGERS[name],)
    if op == "q_sample" and name == "x0":
        return (*FLOATS, torch.uint8)
    table = name == "table" or "alpha" in name or (op, name) == ("eps_loss", "weight")
    return (torch.float32, F64) if table else FLOATS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", ["public", "raw", "reference"])
def test_other_dtypes_are_bad(way: str, op: str) -> None:
    """With the operand's name, by the raw operators too."""
    if way == "raw" and available("cpu") is not None:
        pytest.skip("the CPU library is not built")
    kinds = (RuntimeError,) if way == "raw" else (TypeError, ValueError)
    args = narrowed(arguments(op))
    for name in [name for name, x in args.items() if isinstance(x, Tensor)]:
        for dtype in {*OTHERS, torch.uint8, *FLOATS} - {*allowed(op, name)}:
            changed = args | {name: torch.zeros(args[name].shape).to(dtype)}
            with pytest.raises(kinds, match=rf"{op}: .*\b{name}\b"):
                call(way, op, changed)


PAIRS = {
    "q_sample": ("x0", "noise"),
    "eps_loss": ("prediction", "noise"),
    "vlb_terms": ("model_output", "noise"),
    DDIM: ("x_t", "model_output"),
    DDPM: ("x_t", "noise"),
    "group_norm_silu": ("x", "scale"),
}


@pytest.mark.parametrize("implementation", implementation_params("triton-interpreted", "cuda-ptx"))
@pytest.mark.parametrize("op", OPS)
def test_pairs_of_dtypes_on_gpu_kernels(op: str, implementation: str) -> None:
    """The first operand, which decides about the result, and another one."""
    pairs = list(itertools.permutations(FLOATS[:3], 2))  # equal ones are in the ops' own tests
    pairs += [(torch.uint8, torch.bfloat16)] if op == "q_sample" else []
    for pair in pairs:
        chosen = dict(zip(PAIRS[op], pair, strict=True))
        args = narrowed(with_dtypes(arguments_of(op, "contiguous"), chosen))
        names = exact.differentiable(op, args)
        wanted = exact.outputs(op, args)
        grad = gradient_of(op, wanted[0].value)
        found = evaluate(
            op,
            implementation,
            args,
            gradients=names,
            grad_output=grad.to(result_dtype(op, args)),
        )
        for actual, value in zip(found.outputs, wanted, strict=False):
            value.check(actual, implementation)
        gradients = exact.gradients(op, args, grad)
        for name in names:
            assert found.gradients[name].dtype == args[name].dtype
            gradients[name].check(found.gradients[name], implementation)


def test_large_operands_of_other_dtypes() -> None:
    """Where a read past the end of the smaller one was a crash."""
    t, table = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    x0 = torch.zeros(1, 1 << 22, dtype=F64)
    ones = torch.ones(x0.shape, dtype=torch.float16)
    assert torch.equal(fastdiff.ops.posterior_mean(x0, ones, t, table, table), ones)
    mean = fastdiff.ops.q_sample(x0, t, table, table, ones.float(), dtype=torch.float32)
    assert torch.equal(mean, ones.float())
