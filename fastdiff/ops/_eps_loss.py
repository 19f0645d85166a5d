"""The raw operators of `eps_loss`: what each backend runs, and the gradients.

`reduction` and `kind` are positions in REDUCTIONS and LOSS_KINDS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff._backends import default_backend
from fastdiff.ops import _checks, _library
from fastdiff.reference.eps_loss import LOSS_KINDS, REDUCTIONS
from fastdiff.reference.layout import memory_format_of

_NONE, _MEAN, _SUM = range(3)


def _check(
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    reduction: int,
    kind: int,
    *,
    check_range: bool,
) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    op = "eps_loss"
    _checks.check_tensor(op, "prediction", prediction)
    _checks.check_float(op, "prediction", prediction.dtype)
    _checks.check_sources(op, noise=noise, keys=keys, seed=seed)
    _checks.check_position(op, "reduction", reduction, REDUCTIONS)
    _checks.check_position(op, "kind", kind, LOSS_KINDS)
    if prediction.dim() == 0:
        raise ValueError(f"{op}: prediction has shape (), expected (B, ...)")
    batch, device = prediction.shape[0], prediction.device
    if noise is not None:
        _checks.check_like(op, "noise", noise, "prediction", prediction)
    if keys is not None:
        _checks.check_per_sample(op, "seed", keys, torch.int64, batch, device)
    if weight is not None:
        _checks.check_tensor(op, "weight", weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        _checks.check_per_sample(op, "weight", weight, dtype, batch, device)


def _check_backward(grad: Tensor, *arguments: object, check_range: bool) -> None:
    *arguments, _, need_noise = arguments
    _check(*arguments, check_range=check_range)
    prediction, noise, *_, reduction, _ = arguments
    shape = prediction.shape[:1] if reduction == _NONE else ()
    if grad.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"eps_loss: grad has dtype {grad.dtype}, expected {torch.float32}")
    _checks.check_operand("eps_loss", "grad", grad, shape, "that of the loss", prediction.device)
    if need_noise and noise is None:
        raise ValueError("eps_loss: generated noise has no gradient")


def _unsupported(prediction: Tensor, noise: Tensor | None) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    if prediction.dtype == torch.float64 and (prediction.device.type != "cpu" or noise is None):
        return "float64 kernels exist on the CPU only, and for given noise only"
    if _library.in_functorch_transform():
        return "only the reference runs under torch.func's transforms"
    return None


def _compute_dtype(prediction: Tensor) -> torch.dtype:
    return torch.float64 if prediction.dtype == torch.float64 else torch.float32


def _fake(
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    reduction: int,
    kind: int,
) -> Tensor:
    _checks.check_one_device(prediction, noise, keys, weight)
    shape = prediction.shape[:1] if reduction == _NONE else ()
    return prediction.new_empty(shape, dtype=_compute_dtype(prediction))


def _reference(
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    reduction: int,
    kind: int,
) -> Tensor:
    return reference.eps_loss(
        prediction,
        noise,
        seed=keys if keys is not None else seed,
        stream=stream,
        weight=weight,
        reduction=REDUCTIONS[reduction],
        kind=LOSS_KINDS[kind],
    )


def _dense(
    prediction: Tensor, noise: Tensor | None, keys: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a kernel reads, dense and in the prediction's memory format."""
    memory_format = memory_format_of(prediction)
    return (
        prediction.contiguous(memory_format=memory_format),
        None if noise is None else noise.contiguous(memory_format=memory_format),
        None if keys is None else keys.contiguous(),
    )


def _triton(
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    reduction: int,
    kind: int,
) -> Tensor:
    from fastdiff.triton_kernels import eps_loss as kernels

    _library.refuse_float64("eps_loss", prediction)
    out = _fake(prediction, noise, keys, seed, stream, weight, reduction, kind)
    kernels.eps_loss(
        out,
        *_dense(prediction, noise, keys),
        seed,
        stream,
        None if weight is None else weight.to(out.dtype).contiguous(),
        _scale(prediction, reduction),
        kind,
        memory_format_of(prediction) != torch.contiguous_format,
    )
    return out


def _scale(prediction: Tensor, reduction: int) -> float:
    """What the weighted sum over elements is multiplied with; infinite (so NaN) for no elements."""
    if reduction == _SUM:
        return 1.0
    elements = prediction.shape[1:].numel() if reduction == _NONE else prediction.numel()
    return 1.0 / elements if elements else float("inf")


def _backward_fake(
    grad: Tensor,
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    reduction: int,
    kind: int,
    need_prediction: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor]:
    _checks.check_one_device(prediction, grad, noise, keys, weight)
    return _empty_gradients(prediction, noise, need_prediction, need_noise)


def _empty_gradients(
    prediction: Tensor, noise: Tensor | None, need_prediction: bool, need_noise: bool
) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of prediction and noise; (0,) for one that is not needed."""
    memory_format = memory_format_of(prediction)

    def gradient(needed: bool, like: Tensor) -> Tensor:
        if not needed:
            return like.new_empty((0,))
        return torch.empty(
            like.shape, dtype=like.dtype, device=like.device, memory_format=memory_format
        )

    return (
        gradient(need_prediction, prediction),
        gradient(need_noise, prediction if noise is None else noise),
    )


def _backward_reference(
    grad: Tensor,
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    reduction: int,
    kind: int,
    need_prediction: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor]:
    results = _empty_gradients(prediction, noise, need_prediction, need_noise)
    wanted = [k for k, needed in enumerate((need_prediction, need_noise)) if needed]
    gradients = ()
    with _library.recording():
        x = prediction.detach().requires_grad_(need_prediction)
        n = None if noise is None else noise.detach().requires_grad_(need_noise)
        if wanted:
            loss = _reference(x, n, keys, seed, stream, weight, reduction, kind)
            gradients = torch.autograd.grad(loss, [(x, n)[k] for k in wanted], grad)
    for k, gradient in zip(wanted, gradients, strict=True):
        results[k].copy_(gradient)
    return results


def _backward_triton(
    grad: Tensor,
    prediction: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    weight: Tensor | None,
    reduction: int,
    kind: int,
    need_prediction: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor]:
    from fastdiff.triton_kernels import eps_loss as kernels

    _library.refuse_float64("eps_loss", prediction)
    results = _empty_gradients(prediction, noise, need_prediction, need_noise)
    compute = _compute_dtype(prediction)
    kernels.eps_loss_backward(
        results[0] if need_prediction else None,
        results[1] if need_noise else None,
        grad.to(compute).contiguous(),
        *_dense(prediction, noise, keys),
        seed,
        stream,
        None if weight is None else weight.to(compute).contiguous(),
        _scale(prediction, reduction),
        kind,
        memory_format_of(prediction) != torch.contiguous_format,
    )
    return results


def _with_gradient_fake(prediction: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    gradient, _ = _empty_gradients(prediction, None, True, False)
    return _fake(prediction, *rest), gradient


def _with_gradient(*arguments: object) -> tuple[Tensor, Tensor]:
    """Of the implementations without such a kernel: both passes."""
    loss = _op.default(*arguments)
    gradient, _ = _backward_op.default(torch.ones_like(loss), *arguments, True, False)
    return loss, gradient


class _EpsLoss(torch.autograd.Function):
    """One pass forward, one backward; the noise is read or made again.

    On a CPU the forward pass makes the gradient that `loss.backward()` asks for as well: while both
    tensors are in the cache that costs a store, and no second pass follows.
    """

    @staticmethod
    def forward(ctx, op, backward, prediction, noise, keys, seed, stream, weight, reduction, kind):
        arguments = (prediction, noise, keys, seed, stream, weight, reduction, kind)
        gradient = None
        with torch._C._AutoDispatchBelowAutograd():
            if _makes_gradient(op, prediction, reduction, ctx.needs_input_grad):
                out, gradient = _with_gradient_op.default(*arguments)
            else:
                out = op(*arguments)
        ctx.op, ctx.backward_op = op, backward
        ctx.save_for_backward(prediction, noise, keys, weight, gradient)
        ctx.rest = seed, stream, reduction, kind
        return out

    @staticmethod
    def backward(ctx, grad):
        prediction, noise, keys, weight, gradient = ctx.saved_tensors
        seed, stream, reduction, kind = ctx.rest
        needs = need_prediction, need_noise, need_weight = (
            ctx.needs_input_grad[2],
            ctx.needs_input_grad[3],
            ctx.needs_input_grad[7],
        )
        if torch.is_grad_enabled():  # create_graph: gradients that can be differentiated again
            loss = _reference(prediction, noise, keys, seed, stream, weight, reduction, kind)
            inputs = (prediction, noise, weight)
            wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed]
            found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
            gradients = [next(found) if needed else None for needed in needs]
        elif gradient is not None and _is_one(grad):
            gradients = [gradient, None, None]
        else:
            gradients = [None, None, None]
            if need_prediction or need_noise:
                fused = ctx.backward_op(
                    grad,
                    prediction,
                    noise,
                    keys,
                    seed,
                    stream,
                    weight,
                    reduction,
                    kind,
                    need_prediction,
                    need_noise,
                )
                gradients[:2] = (x if n else None for x, n in zip(fused, needs, strict=False))
            if need_weight:
                # The unweighted losses of the samples, which the forward pass did not keep.
                losses = ctx.op(prediction, noise, keys, seed, stream, None, _NONE, kind)
                if reduction == _SUM:
                    losses = losses * prediction.shape[1:].numel()
                elif reduction == _MEAN:
                    losses = losses / len(prediction)
                gradients[2] = (grad * losses).to(weight.dtype)
        return (None, None, *gradients[:2], None, None, None, gradients[2], None, None)


def _makes_gradient(
    op: Callable, prediction: Tensor, reduction: int, needs_input_grad: tuple[bool, ...]
) -> bool:
    """Whether the forward pass makes the gradient: the compiled CPU kernels do, of one loss."""
    return (
        needs_input_grad[2]
        and not needs_input_grad[3]
        and not needs_input_grad[7]
        and reduction != _NONE
        and op is _op.default
        and prediction.is_cpu
        and prediction.dtype != torch.float64
        and default_backend("cpu") == "cpu"
        and type(prediction) in (Tensor, torch.nn.Parameter)  # no stand-in for one, as in a trace
    )


def _is_one(grad: Tensor) -> bool:
    """Whether a gradient on the CPU is 1; under vmap it has no value to look at."""
    return torch._C._functorch.peek_interpreter_stack() is None and grad.item() == 1


def _autograd(op, *args, backward=None):
    if backward is None:
        backward = _backward_op.triton if op is _op.triton else _backward_op.default
    return _EpsLoss.apply(op, backward, *args)


_ARGUMENTS = (
    "Tensor prediction, Tensor? noise, Tensor? keys, SymInt? seed, SymInt stream, "
    "Tensor? weight, int reduction, int kind"
)
_op = _library.define(
    "eps_loss",
    f"({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    autograd=_autograd,
    reference=_reference,
    triton=_triton,
    check=_check,
)
_with_gradient_op = _library.define(
    "eps_loss_with_gradient",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=_with_gradient_fake,
    autograd=None,
    reference=_with_gradient,
    triton=_with_gradient,
)
_backward_op = _library.define(
    "eps_loss_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool need_prediction, bool need_noise) -> (Tensor, Tensor)",
    fake=_backward_fake,
    autograd=None,
    reference=_backward_reference,
    triton=_backward_triton,
    check=_check_backward,
)
