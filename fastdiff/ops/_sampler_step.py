"""What `ddim_step` and `ddpm_step` share: checks, capabilities, schema, gradients.

Both raw operators have the arguments of `Arguments`. `flag` is the one that differs:
use_clipped_model_output of ddim_step, learned_range of ddpm_step.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff._backends import select_backend
from fastdiff.ops import _library
from fastdiff.reference import checks
from fastdiff.reference.layout import memory_format_of
from fastdiff.reference.step_columns import PREDICTIONS, check_step

DDIM, DDPM = "ddim_step", "ddpm_step"
_FLAGS = {DDIM: "use_clipped_model_output", DDPM: "learned_range"}


class Arguments(NamedTuple):
    """The raw operators' arguments, in the order of their schema."""

    x_t: Tensor
    model_output: Tensor
    step: Tensor
    table: Tensor
    prediction: int
    clip: bool
    flag: bool
    uncond: Tensor | None
    guidance_scale: float
    noise: Tensor | None
    keys: Tensor | None
    seed: int | None
    stream: int
    return_pred_x0: bool


# The arguments that have gradients; the schema's `needs` are in this order.
_DIFFERENTIABLE = ("x_t", "model_output", "uncond", "noise")


def call(
    op: _library.Op,
    name: str,
    x_t: Tensor,
    model_output: Tensor,
    step: Tensor,
    table: Tensor,
    prediction: str,
    clip: bool,
    flag: bool,
    uncond: Tensor | None,
    guidance_scale: float,
    noise: Tensor | None,
    seed: int | Tensor | None,
    stream: int,
    return_pred_x0: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The public function's body."""
    checks.check_name(name, "prediction", prediction, PREDICTIONS)
    if noise is not None and seed is not None:
        raise ValueError(f"{name}: pass either noise or seed; both were given")
    keys, integer = checks.split_seed(name, seed)
    arguments = (
        x_t,
        model_output,
        step,
        table,
        PREDICTIONS.index(prediction),
        clip,
        flag,
        uncond,
        guidance_scale,
        noise,
        keys,
        integer,
        checks.as_int64(name, "stream", stream),
        return_pred_x0,
    )
    try:
        backend = select_backend(name, x_t, unsupported(x_t, table, noise, seed))
    except AttributeError:  # not a tensor
        op.check(Arguments(*arguments), check_range=False)
        raise
    x_s, pred_x0 = op.call(backend, arguments, (x_t, model_output, uncond, noise))
    return (x_s, pred_x0) if return_pred_x0 else x_s


def unsupported(
    x_t: Tensor, table: Tensor, noise: Tensor | None, seed: int | Tensor | None
) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    if table.dtype == torch.float64:
        return "only the reference takes float64 tables"
    if table.requires_grad and torch.is_grad_enabled():
        return "only the reference differentiates the table"
    if (reason := _library.why_reference(x_t)) is not None:
        return reason
    if x_t.dtype == torch.float64 and (x_t.device.type != "cpu" or seed is not None):
        return "float64 kernels exist on the CPU only, and not with generated noise"
    return None


def check(name: str, a: Arguments, *, check_range: bool) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    for tensor_name in ("x_t", "model_output", "step", "table"):
        checks.check_tensor(name, tensor_name, getattr(a, tensor_name))
    checks.check_position(name, "prediction", a.prediction, PREDICTIONS)
    checks.check_flags(name, clip=a.clip, return_pred_x0=a.return_pred_x0, **{_FLAGS[name]: a.flag})
    checks.check_noise_source(name, a.noise, a.keys, a.seed, required=False)
    device = a.x_t.device
    channels = a.x_t.shape[1] if a.x_t.dim() > 1 else 0
    two_heads = (2 * channels,)
    allowed = (channels, *two_heads) if name == DDIM else two_heads if a.flag else (channels,)
    checks.check_float(name, "x_t", a.x_t.dtype)
    for tensor_name in ("model_output", "uncond", "noise"):
        if (tensor := getattr(a, tensor_name)) is not None:
            checks.check_tensor(name, tensor_name, tensor)
            checks.check_float(name, tensor_name, tensor.dtype)
    check_step(
        name,
        a.x_t,
        a.model_output,
        a.step,
        a.table,
        PREDICTIONS[a.prediction],
        a.uncond,
        a.noise,
        _library.joined_seed(a),
        allowed,
    )
    if a.uncond is not None and a.uncond.shape != a.model_output.shape:
        raise ValueError(
            f"{name}: uncond has shape {tuple(a.uncond.shape)}, expected "
            f"{tuple(a.model_output.shape)} as model_output"
        )
    if a.table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: table has dtype {a.table.dtype}, expected torch.float32")
    for tensor_name in ("model_output", "step", "table", "uncond", "noise"):
        if (tensor := getattr(a, tensor_name)) is not None and tensor.device != device:
            raise ValueError(
                f"{name}: {tensor_name} is on {tensor.device}, expected {device} as x_t"
            )
    if a.keys is not None:
        checks.check_per_sample(name, "seed", a.keys, torch.int64, a.x_t.shape[0], device)
    if name == DDPM and a.noise is None and a.keys is None and a.seed is None:
        raise ValueError(f"{name}: pass either noise or seed; neither was given")
    if not isinstance(a.guidance_scale, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: guidance_scale is {a.guidance_scale!r}, expected a number")
    if not 0 <= a.guidance_scale <= checks.LARGEST_FLOAT:  # false for NaN
        raise ValueError(
            f"{name}: guidance_scale is {checks.shown(a.guidance_scale)}, expected a finite number "
            ">= 0"
        )
    if check_range:
        rows = a.table.shape[0]
        checks.check_timestep_range(name, a.step, rows, "step", "number of rows of the table")


def run_reference(name: str, a: Arguments) -> tuple[Tensor, Tensor]:
    memory_format = memory_format_of(a.x_t)
    results = getattr(reference, name)(
        a.x_t,
        a.model_output,
        a.step,
        a.table,
        prediction=PREDICTIONS[a.prediction],
        clip=a.clip,
        **{_FLAGS[name]: a.flag},
        uncond=a.uncond,
        guidance_scale=a.guidance_scale,
        noise=a.noise,
        seed=_library.joined_seed(a),
        stream=a.stream,
        return_pred_x0=a.return_pred_x0,
    )
    if not a.return_pred_x0:
        return results.contiguous(memory_format=memory_format), a.x_t.new_empty((0,))
    x_s, pred_x0 = (x.contiguous(memory_format=memory_format) for x in results)
    return x_s, pred_x0


def empty_results(a: Arguments) -> tuple[Tensor, Tensor]:
    """Memory for x_s and x0; (0,) for an x0 that is not returned."""

    def empty() -> Tensor:
        return torch.empty(
            a.x_t.shape,
            dtype=a.x_t.dtype,
            device=a.x_t.device,
            memory_format=memory_format_of(a.x_t),
        )

    return empty(), empty() if a.return_pred_x0 else a.x_t.new_empty((0,))


def run_triton(name: str, a: Arguments) -> tuple[Tensor, Tensor]:
    from fastdiff.triton_kernels import sampler_step as kernels

    _library.refuse_float64(name, a.x_t, a.table)
    x_s, pred_x0 = empty_results(a)
    memory_format = memory_format_of(a.x_t)

    def dense(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous(memory_format=memory_format)

    kernels.sampler_step(
        x_s,
        pred_x0 if a.return_pred_x0 else None,
        dense(a.x_t),
        dense(a.model_output),
        dense(a.uncond),
        dense(a.noise),
        a.step.contiguous(),
        a.table.contiguous(),
        a.prediction,
        a.clip,
        name == DDPM,
        a.flag,
        a.guidance_scale,
        _library.contiguous(a.keys),
        a.seed,
        a.stream,
        memory_format != torch.contiguous_format,
    )
    return x_s, pred_x0


class BackwardArguments(NamedTuple):
    """The arguments of the backward operator, which has the forward one's among its own."""

    grad_x_s: Tensor
    grad_pred_x0: Tensor | None
    needs: list[bool]
    forward: Arguments

    @classmethod
    def from_schema(
        cls, grad_x_s: Tensor, grad_pred_x0: Tensor | None, needs: list[bool], *forward: object
    ) -> BackwardArguments:
        return cls(grad_x_s, grad_pred_x0, needs, Arguments(*forward))


def _gradients(name: str, b: BackwardArguments, *, create_graph: bool) -> list[Tensor | None]:
    """The gradients of `_DIFFERENTIABLE`, by differentiating the reference."""
    a = b.forward
    inputs = [getattr(a, k) for k in _DIFFERENTIABLE]
    with torch.enable_grad():
        if not create_graph:
            inputs = [
                None if x is None else x.detach().requires_grad_(n)
                for x, n in zip(inputs, b.needs, strict=True)
            ]
            a = a._replace(**dict(zip(_DIFFERENTIABLE, inputs, strict=True)))
        outputs = run_reference(name, a)
    wanted = [x for x, needed in zip(inputs, b.needs, strict=True) if needed]
    pairs = [(outputs[0], b.grad_x_s)]
    if b.grad_pred_x0 is not None:
        pairs.append((outputs[1], b.grad_pred_x0))
    pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,  # the output of a step that clips every x0
            materialize_grads=True,
        )
        if wanted
        else ()
    )
    return [next(found) if needed else None for needed in b.needs]


def _fake(a: Arguments) -> tuple[Tensor, Tensor]:
    checks.check_one_device(*a)
    return empty_results(a)


def _fake_backward(b: BackwardArguments) -> list[Tensor]:
    inputs = [getattr(b.forward, k) for k in _DIFFERENTIABLE]
    return [torch.empty_like(x) for x, needed in zip(inputs, b.needs, strict=True) if needed]


def _reference_backward(name: str, b: BackwardArguments) -> list[Tensor]:
    results = _fake_backward(b)
    gradients = [g for g in _gradients(name, b, create_graph=False) if g is not None]
    for result, gradient in zip(results, gradients, strict=True):
        result.copy_(gradient)
    return results


def define(name: str) -> _library.Op:
    """The op called `name`.

    The backward pass is an op of its own, so that torch.compile need not look into it. It runs in
    plain PyTorch on every backend: sampling, where time matters, needs no gradient.
    """
    schema = _schema(name)
    backward_op = _library.define(
        f"{name}_backward",
        f"(Tensor grad_x_s, Tensor? grad_pred_x0, bool[] needs, {schema}) -> Tensor[]",
        BackwardArguments.from_schema,
        fake=_fake_backward,
        autograd=None,
        reference=functools.partial(_reference_backward, name),
        triton=functools.partial(_reference_backward, name),
    )

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, op, *arguments):
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*arguments)
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in arguments))
            ctx.constants = tuple(None if isinstance(x, Tensor) else x for x in arguments)
            return outputs

        @staticmethod
        def backward(ctx, grad_x_s, grad_pred_x0):
            saved = zip(ctx.saved_tensors, ctx.constants, strict=True)
            a = Arguments(*(constant if x is None else x for x, constant in saved))
            needed = Arguments(*ctx.needs_input_grad[1:])
            b = BackwardArguments(
                grad_x_s,
                grad_pred_x0 if a.return_pred_x0 else None,
                [getattr(needed, k) for k in _DIFFERENTIABLE],
                a,
            )
            if torch.is_grad_enabled():  # create_graph: gradients that can be differentiated again
                gradients = _gradients(name, b, create_graph=True)
            else:
                found = iter(backward_op.default(b.grad_x_s, b.grad_pred_x0, b.needs, *a))
                gradients = [next(found) if n else None for n in b.needs]
            grads = dict.fromkeys(Arguments._fields)
            grads.update(zip(_DIFFERENTIABLE, gradients, strict=True))
            return None, *grads.values()

    return _library.define(
        name,
        f"({schema}) -> (Tensor, Tensor)",
        Arguments,
        fake=_fake,
        autograd=Step.apply,
        reference=functools.partial(run_reference, name),
        triton=functools.partial(run_triton, name),
        check=functools.partial(check, name),
    )


def _schema(name: str) -> str:
    return (
        "Tensor x_t, Tensor model_output, Tensor step, Tensor table, int prediction, bool clip, "
        f"bool {_FLAGS[name]}, Tensor? uncond, float guidance_scale, Tensor? noise, Tensor? keys, "
        "SymInt? seed, SymInt stream, bool return_pred_x0"
    )
