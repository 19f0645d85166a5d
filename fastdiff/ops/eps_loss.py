"""`eps_loss`: the error of a predicted noise, with the noise given or regenerated in the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff._backends import default_backend, select_backend
from fastdiff.ops import _library
from fastdiff.reference import checks
from fastdiff.reference.eps_loss import LOSS_KINDS, REDUCTIONS
from fastdiff.reference.layout import memory_format_of

_NONE, _MEAN, _SUM = map(REDUCTIONS.index, ("none", "mean", "sum"))


class Arguments(NamedTuple):
    """The raw operator's arguments, in the order of its schema.

    `reduction` and `kind` are positions in REDUCTIONS and LOSS_KINDS.
    """

    prediction: Tensor
    noise: Tensor | None
    keys: Tensor | None
    seed: int | None
    stream: int
    weight: Tensor | None
    reduction: int
    kind: int


_SCHEMA = (
    "Tensor prediction, Tensor? noise, Tensor? keys, SymInt? seed, SymInt stream, "
    "Tensor? weight, int reduction, int kind"
)


class BackwardArguments(NamedTuple):
    """The arguments of the backward operator, which has the forward one's among its own."""

    grad: Tensor
    forward: Arguments
    need_prediction: bool
    need_noise: bool

    @classmethod
    def from_schema(cls, grad: Tensor, *rest: object) -> BackwardArguments:
        *forward, need_prediction, need_noise = rest
        return cls(grad, Arguments(*forward), need_prediction, need_noise)


def eps_loss(
    prediction: Tensor,
    noise: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    kind: str = "mse",
) -> Tensor:
    """w_k mean_e l(prediction[k, e] - noise[k, e]) per sample, or its mean (DDPM eq. 14, Math §6).

    l(d) is d^2 ("mse"), |d| ("l1") or Huber's d^2 / 2 for |d| < 1, else |d| - 1/2 ("huber").
    With `seed` the noise is the one that `q_sample` and `philox_normal` make from it; it never
    touches memory, forward or backward. Sums are float32 whatever the dtype of the tensors, taken
    in a fixed order that does not depend on the batch around a sample. The backward pass reads
    and writes every tensor once.

    Parameters
    ----------
    prediction
        (B, ...), floating point, contiguous or channels_last; other strides work through a copy.
    noise
        Same shape as prediction, floating point. Exclusive with `seed`; one of them is needed. Any
        target will do, not only noise.
    seed
        An int, or int64 keys (B,).
    stream
        Separates uses of one seed.
    weight
        (B,) float32 or float64 weight w of each sample; default 1.
    reduction
        "mean": over all elements of the weighted losses; "none": (B,), the weighted mean over each
        sample's elements; "sum": over all elements.
    kind
        "mse", "l1" or "huber".

    Returns
    -------
    Tensor
        Shape () or (B,); float32 (float64 for a float64 prediction). Differentiable in prediction,
        noise and weight; a second derivative is computed in plain PyTorch.
        Under autocast nothing is cast.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.

    Examples
    --------
    >>> import torch, fastdiff
    >>> prediction = torch.zeros(8, 3, 32, 32, requires_grad=True)
    >>> loss = fastdiff.ops.eps_loss(prediction, seed=0)  # about 1: normals have variance 1
    >>> loss.backward()
    """
    if (noise is None) == (seed is None):
        given = "neither" if noise is None else "both"
        raise ValueError(f"eps_loss: pass either noise or seed; {given} was given")
    checks.check_name("eps_loss", "reduction", reduction, REDUCTIONS)
    checks.check_name("eps_loss", "kind", kind, LOSS_KINDS)
    keys, integer = checks.split_seed("eps_loss", seed)
    arguments = (
        prediction,
        noise,
        keys,
        integer,
        checks.as_int64("eps_loss", "stream", stream),
        weight,
        REDUCTIONS.index(reduction),
        LOSS_KINDS.index(kind),
    )
    try:
        backend = select_backend("eps_loss", prediction, _unsupported(prediction, noise))
    except AttributeError:  # not a tensor
        _check(Arguments(*arguments), check_range=False)
        raise
    return _op.call(backend, arguments, (prediction, noise, weight))


def _unsupported(prediction: Tensor, noise: Tensor | None) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    if prediction.dtype == torch.float64 and (prediction.device.type != "cpu" or noise is None):
        return "float64 kernels exist on the CPU only, and for given noise only"
    if (reason := _library.why_reference(prediction)) is not None:
        return reason
    return None


def _check(a: Arguments, *, check_range: bool) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    op = "eps_loss"
    checks.check_tensor(op, "prediction", a.prediction)
    checks.check_float(op, "prediction", a.prediction.dtype)
    checks.check_noise_source(op, a.noise, a.keys, a.seed, required=True)
    checks.check_position(op, "reduction", a.reduction, REDUCTIONS)
    checks.check_position(op, "kind", a.kind, LOSS_KINDS)
    if a.prediction.dim() == 0:
        raise ValueError(f"{op}: prediction has shape (), expected (B, ...)")
    batch, device = a.prediction.shape[0], a.prediction.device
    if a.noise is not None:
        checks.check_like(op, "noise", a.noise, "prediction", a.prediction)
    if a.keys is not None:
        checks.check_per_sample(op, "seed", a.keys, torch.int64, batch, device)
    if a.weight is not None:
        checks.check_tensor(op, "weight", a.weight)
        dtype = torch.float64 if a.weight.dtype == torch.float64 else torch.float32
        checks.check_per_sample(op, "weight", a.weight, dtype, batch, device)


def _check_backward(b: BackwardArguments, *, check_range: bool) -> None:
    op, a = "eps_loss", b.forward
    _check(a, check_range=check_range)
    if b.grad.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: grad has dtype {b.grad.dtype}, expected {torch.float32}")
    checks.check_operand(
        op, "grad", b.grad, _loss_shape(a), "that of the loss", a.prediction.device
    )
    if b.need_noise and a.noise is None:
        raise ValueError(f"{op}: noise is generated, expected a tensor that can have a gradient")


def _compute_dtype(a: Arguments) -> torch.dtype:
    return torch.float64 if a.prediction.dtype == torch.float64 else torch.float32


def _loss_shape(a: Arguments) -> tuple[int, ...]:
    return a.prediction.shape[:1] if a.reduction == _NONE else ()


def _empty_result(a: Arguments) -> Tensor:
    return a.prediction.new_empty(_loss_shape(a), dtype=_compute_dtype(a))


def _empty_gradients(
    a: Arguments, need_prediction: bool, need_noise: bool
) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of prediction and noise; (0,) for one that is not needed."""
    memory_format = memory_format_of(a.prediction)

    def gradient(needed: bool, like: Tensor) -> Tensor:
        if not needed:
            return like.new_empty((0,))
        return torch.empty(
            like.shape, dtype=like.dtype, device=like.device, memory_format=memory_format
        )

    return (
        gradient(need_prediction, a.prediction),
        gradient(need_noise, a.prediction if a.noise is None else a.noise),
    )


def _fake(a: Arguments) -> Tensor:
    checks.check_one_device(*a)
    return _empty_result(a)


def _fake_with_gradient(a: Arguments) -> tuple[Tensor, Tensor]:
    gradient, _ = _empty_gradients(a, True, False)
    return _fake(a), gradient


def _fake_backward(b: BackwardArguments) -> tuple[Tensor, Tensor]:
    checks.check_one_device(b.grad, *b.forward)
    return _empty_gradients(b.forward, b.need_prediction, b.need_noise)


def _reference(a: Arguments) -> Tensor:
    return reference.eps_loss(
        a.prediction,
        a.noise,
        seed=_library.joined_seed(a),
        stream=a.stream,
        weight=a.weight,
        reduction=REDUCTIONS[a.reduction],
        kind=LOSS_KINDS[a.kind],
    )


def _reference_backward(b: BackwardArguments) -> tuple[Tensor, Tensor]:
    a, needs = b.forward, (b.need_prediction, b.need_noise)
    results = _empty_gradients(a, *needs)
    with _library.recording():
        a = a._replace(
            prediction=a.prediction.detach().requires_grad_(b.need_prediction),
            noise=None if a.noise is None else a.noise.detach().requires_grad_(b.need_noise),
        )
        wanted = [x for x, needed in zip((a.prediction, a.noise), needs, strict=True) if needed]
        found = torch.autograd.grad(_reference(a), wanted, b.grad) if wanted else ()
    needed_results = [x for x, needed in zip(results, needs, strict=True) if needed]
    for result, gradient in zip(needed_results, found, strict=True):
        result.copy_(gradient)
    return results


def _with_gradient(a: Arguments) -> tuple[Tensor, Tensor]:
    """Both passes, for the implementations that have no kernel for both in one."""
    loss = _op.default(*a)
    gradient, _ = _backward_op.default(torch.ones_like(loss), *a, True, False)
    return loss, gradient


def _triton_inputs(a: Arguments) -> tuple:
    """What the Triton kernels read: dense, in the prediction's memory format."""
    memory_format = memory_format_of(a.prediction)
    return (
        a.prediction.contiguous(memory_format=memory_format),
        None if a.noise is None else a.noise.contiguous(memory_format=memory_format),
        _library.contiguous(a.keys),
        a.seed,
        a.stream,
        None if a.weight is None else a.weight.to(_compute_dtype(a)).contiguous(),
        _scale(a),
        a.kind,
        memory_format != torch.contiguous_format,
    )


def _scale(a: Arguments) -> float:
    """What the weighted sum over elements is multiplied with; infinite (so NaN) for no elements."""
    if a.reduction == _SUM:
        return 1.0
    counted = a.prediction.shape[1:] if a.reduction == _NONE else a.prediction.shape
    elements = counted.numel()
    return 1.0 / elements if elements else float("inf")


def _triton(a: Arguments) -> Tensor:
    from fastdiff.triton_kernels import eps_loss as kernels

    _library.refuse_float64("eps_loss", a.prediction)
    loss = _empty_result(a)
    kernels.eps_loss(loss, *_triton_inputs(a))
    return loss


def _triton_backward(b: BackwardArguments) -> tuple[Tensor, Tensor]:
    from fastdiff.triton_kernels import eps_loss as kernels

    a = b.forward
    _library.refuse_float64("eps_loss", a.prediction)
    results = _empty_gradients(a, b.need_prediction, b.need_noise)
    kernels.eps_loss_backward(
        results[0] if b.need_prediction else None,
        results[1] if b.need_noise else None,
        b.grad.to(_compute_dtype(a)).contiguous(),
        *_triton_inputs(a),
    )
    return results


class _EpsLoss(torch.autograd.Function):
    """One pass forward, one backward; the noise is read or regenerated.

    On a CPU the forward pass also computes the gradient that `loss.backward()` asks for. Both
    tensors are in the cache then, so it costs one more store and saves the second pass.
    """

    @staticmethod
    def forward(ctx, op, backward, *arguments):
        a = Arguments(*arguments)
        gradient = None
        with torch._C._AutoDispatchBelowAutograd():
            if ctx.needs_input_grad[2:] == _PREDICTION_ALONE and _computes_gradient(op, a):
                loss, gradient = _with_gradient_op.default(*arguments)
            else:
                loss = op(*arguments)
        ctx.op, ctx.backward_op = op, backward
        ctx.save_for_backward(a.prediction, a.noise, a.keys, a.weight, gradient)
        ctx.constants = a.seed, a.stream, a.reduction, a.kind
        return loss

    @staticmethod
    def backward(ctx, grad):
        prediction, noise, keys, weight, gradient = ctx.saved_tensors
        grads = dict.fromkeys(Arguments._fields)
        create_graph = torch.is_grad_enabled()
        if gradient is not None and not create_graph and _is_one(grad):
            grads["prediction"] = gradient
            return None, None, *grads.values()
        seed, stream, reduction, kind = ctx.constants
        a = Arguments(prediction, noise, keys, seed, stream, weight, reduction, kind)
        needed = Arguments(*ctx.needs_input_grad[2:])
        if create_graph:  # gradients that can be differentiated again
            wanted = [name for name in ("prediction", "noise", "weight") if getattr(needed, name)]
            inputs = [getattr(a, name) for name in wanted]
            found = torch.autograd.grad(_reference(a), inputs, grad, create_graph=True)
            grads.update(zip(wanted, found, strict=True))
        else:
            if needed.prediction or needed.noise:
                found = ctx.backward_op(grad, *a, needed.prediction, needed.noise)
                grads["prediction"] = found[0] if needed.prediction else None
                grads["noise"] = found[1] if needed.noise else None
            if needed.weight:
                grads["weight"] = (grad * _unweighted(ctx.op, a)).to(weight.dtype)
        return None, None, *grads.values()


def _unweighted(op: Callable, a: Arguments) -> Tensor:
    """The loss's derivatives by the weights, (B,), which the forward pass did not keep."""
    losses = op(*a._replace(weight=None, reduction=_NONE))
    if a.reduction == _SUM:
        return losses * a.prediction.shape[1:].numel()
    return losses / len(a.prediction) if a.reduction == _MEAN else losses


_PREDICTION_ALONE = tuple(name == "prediction" for name in Arguments._fields)


def _computes_gradient(op: Callable, a: Arguments) -> bool:
    """Whether the forward pass computes the gradient: the compiled CPU kernels do, of one loss."""
    return (
        a.reduction != _NONE
        and op is _op.default
        and a.prediction.is_cpu
        and a.prediction.dtype != torch.float64
        and default_backend("cpu") == "cpu"
        and type(a.prediction) in (Tensor, torch.nn.Parameter)  # not a tracer's stand-in
    )


def _is_one(grad: Tensor) -> bool:
    """Whether a gradient on the CPU is 1; under vmap and for make_fx it has no value to look at."""
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
        and grad.item() == 1
    )


def _autograd(op: Callable, *arguments: object, backward: Callable | None = None) -> Tensor:
    if backward is None:
        backward = _backward_op.triton if op is _op.triton else _backward_op.default
    return _EpsLoss.apply(op, backward, *arguments)


_op = _library.define(
    "eps_loss",
    f"({_SCHEMA}) -> Tensor",
    Arguments,
    fake=_fake,
    autograd=_autograd,
    reference=_reference,
    triton=_triton,
    check=_check,
)
_with_gradient_op = _library.define(
    "eps_loss_with_gradient",
    f"({_SCHEMA}) -> (Tensor, Tensor)",
    Arguments,
    fake=_fake_with_gradient,
    autograd=None,
    reference=_with_gradient,
    triton=_with_gradient,
)
_backward_op = _library.define(
    "eps_loss_backward",
    f"(Tensor grad, {_SCHEMA}, bool need_prediction, bool need_noise) -> (Tensor, Tensor)",
    BackwardArguments.from_schema,
    fake=_fake_backward,
    autograd=None,
    reference=_reference_backward,
    triton=_triton_backward,
    check=_check_backward,
)
