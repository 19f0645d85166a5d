"""`group_norm_silu`: group normalization, time embedding and SiLU, fused."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdiff import reference
from fastdiff._backends import select_backend
from fastdiff.ops import _checks, _library
from fastdiff.ops._group_norm_silu_checks import check as _check
from fastdiff.ops._group_norm_silu_checks import check_backward as _check_backward
from fastdiff.reference.group_norm_silu import ACTIVATIONS, compute_dtype_of, group_statistics
from fastdiff.reference.layout import memory_format_of

# The schema's `activation` is a position in ACTIVATIONS.
_ACTIVATION_NUMBER = {name: number for number, name in enumerate(ACTIVATIONS)}


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    r"""y = act(norm(x + channel_bias) (1 + scale) + shift), and its gradients, fused.

    norm(h) = (h - mean) / sqrt(var + eps) weight + bias with the mean and the biased variance of
    each of the `num_groups` groups of consecutive channels of each sample (Wu & He 2018, arXiv
    1803.08494); act(z) = z sigmoid(z) for "silu", z for "identity". `channel_bias` is DDPM's
    additive time embedding, `scale` and `shift` are AdaGN's (Dhariwal & Nichol 2021, arXiv
    2105.05233, eq. 6).

    Statistics and arithmetic are float32 whatever the dtype of the tensors (float64 for float64
    x), and never E[h^2] - E[h]^2: constant groups, means far above the deviation and float16 values
    whose squares overflow are right. Deterministic: sums are taken in a fixed order that depends
    neither on the batch around a sample nor on the number of threads. For the backward pass only x,
    the small operands and mean and rstd (B, G) are kept.

    Parameters
    ----------
    x
        (B, C, \*spatial) with 1 to 3 spatial dimensions, floating point, contiguous or
        channels_last; other strides work through a copy.
    num_groups
        G, a divisor of C.
    weight, bias
        (C,), floating point, or None for ones and zeros. Any dtype goes with any dtype of x.
    eps
        Added to the variance; positive.
    channel_bias, scale, shift
        (B, C), floating point, or None for zeros. Halves of a `chunk(2, dim=1)` are read in place.
    activation
        "silu" or "identity".

    Returns
    -------
    Tensor
        Shape and dtype of x, in its memory format. Differentiable in all tensors; a second
        derivative, and torch.func's transforms, are computed in plain PyTorch.
        Under autocast nothing is cast: the result keeps the dtype of x, and float16 x with float32
        or bfloat16 weights is computed in float32 like everything else.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.

    Examples
    --------
    >>> import torch, fastdiff
    >>> x, time = torch.randn(4, 64, 16, 16, requires_grad=True), torch.randn(4, 64)
    >>> weight, bias = torch.ones(64), torch.zeros(64)
    >>> y = fastdiff.ops.group_norm_silu(x, 32, weight, bias, channel_bias=time)
    >>> y.sum().backward()
    """
    number = _ACTIVATION_NUMBER.get(activation) if isinstance(activation, str) else None
    if number is None:
        raise ValueError(
            f"group_norm_silu: unknown activation {activation!r}; choose from "
            f"{', '.join(ACTIVATIONS)}"
        )
    arguments = (x, num_groups, weight, bias, eps, channel_bias, scale, shift, number)
    try:
        backend = select_backend("group_norm_silu", x, _unsupported(x))
    except AttributeError:  # not a tensor
        _check(*arguments, check_range=False)
        raise
    if backend == "reference":
        _check(*arguments, check_range=True)
        return reference.group_norm_silu(*arguments[:-1], activation)
    differentiable = (x, weight, bias, channel_bias, scale, shift)
    return _op.call(backend, arguments, differentiable)[0]


def _unsupported(x: Tensor) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    if x.dtype == torch.float64 and x.device.type != "cpu":
        return "float64 kernels exist on the CPU only"
    if _library.in_functorch_transform():
        return "only the reference runs under torch.func's transforms"
    if forward_ad._current_level >= 0:
        return "only the reference differentiates in forward mode"
    return None


def _channels_last(x: Tensor) -> bool:
    return memory_format_of(x) != torch.contiguous_format


def _adjacent(operand: Tensor | None) -> Tensor | None:
    """A small operand as kernels read it: any stride between samples, none between channels."""
    if operand is None or operand.shape[-1] <= 1 or operand.stride(-1) == 1:
        return operand
    return operand.contiguous()


def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.check_one_device(x, weight, bias, channel_bias, scale, shift)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    mean, rstd = (
        x.new_empty((x.shape[0], num_groups), dtype=compute_dtype_of(x)) for _ in range(2)
    )
    return y, mean, rstd


def _reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    y = reference.group_norm_silu(
        x, num_groups, weight, bias, eps, channel_bias, scale, shift, ACTIVATIONS[activation]
    )
    return y, *group_statistics(x, num_groups, eps, channel_bias)


def _triton(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastdiff.triton_kernels import group_norm_silu as kernels

    _library.refuse_float64("group_norm_silu", x)
    results = _fake(x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation)
    kernels.group_norm_silu(
        *results,
        x.contiguous(memory_format=memory_format_of(x)),
        *(num_groups, _adjacent(weight), _adjacent(bias), eps, _adjacent(channel_bias)),
        *(_adjacent(scale), _adjacent(shift), activation, _channels_last(x)),
    )
    return results


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_gradients(x: Tensor, operands: tuple, needs: tuple[bool, ...]) -> _Gradients:
    """Memory for the gradients of x and the small operands; (0,) for one that is not needed."""
    memory_formats = (memory_format_of(x), *[torch.contiguous_format] * len(operands))
    return tuple(
        torch.empty(like.shape, dtype=like.dtype, device=x.device, memory_format=memory_format)
        if needed
        else x.new_empty((0,))
        for like, memory_format, needed in zip((x, *operands), memory_formats, needs, strict=True)
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    *needs: bool,
) -> _Gradients:
    _checks.check_one_device(x, grad, mean, rstd, weight, bias, channel_bias, scale, shift)
    return _empty_gradients(x, (weight, bias, channel_bias, scale, shift), needs)


def _backward_reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    *needs: bool,
) -> _Gradients:
    operands = weight, bias, channel_bias, scale, shift
    results = _empty_gradients(x, operands, needs)
    gradients = reference.group_norm_silu_backward(
        grad, x, mean, rstd, num_groups, *operands, ACTIVATIONS[activation]
    )
    for result, gradient, needed in zip(results, gradients, needs, strict=True):
        if needed:
            result.copy_(gradient)
    return results


def _backward_triton(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: int,
    *needs: bool,
) -> _Gradients:
    from fastdiff.triton_kernels import group_norm_silu as kernels

    _library.refuse_float64("group_norm_silu", x)
    operands = weight, bias, channel_bias, scale, shift
    results = _empty_gradients(x, operands, needs)
    memory_format = memory_format_of(x)
    kernels.group_norm_silu_backward(
        *(result if needed else None for result, needed in zip(results, needs, strict=True)),
        grad.to(x.dtype).contiguous(memory_format=memory_format),
        x.contiguous(memory_format=memory_format),
        mean.contiguous(),
        rstd.contiguous(),
        num_groups,
        *(_adjacent(operand) for operand in operands),
        activation,
        _channels_last(x),
    )
    return results


def _below_autograd(op, *args):
    """Call past the autograd kernel, or what the dispatcher has for an op without one (1 us)."""
    guard = torch._C._AutoDispatchBelowAutograd()
    try:
        return op(*args)
    finally:
        del guard


class _GroupNormSilu(torch.autograd.Function):
    """Keeps x, the small operands, mean and rstd; the activation's input is computed again.

    On tiny tensors Python is most of the time, so what is no tensor travels in one argument: `call`
    is [op, backward, num_groups, eps, activation], and forward leaves mean and rstd in it. As
    outputs they would have to be marked as not differentiable, and would bring gradients back.
    """

    @staticmethod
    def forward(ctx, call, x, weight, bias, channel_bias, scale, shift):
        op, _, num_groups, eps, activation = call
        y, mean, rstd = _below_autograd(
            op, x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation
        )
        ctx.save_for_backward(x, weight, bias, channel_bias, scale, shift, mean, rstd)
        ctx.call = tuple(call)
        call[:] = mean, rstd
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, channel_bias, scale, shift, mean, rstd = ctx.saved_tensors
        _, backward, num_groups, eps, activation = ctx.call
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph: gradients that can be differentiated again
            inputs = x, weight, bias, channel_bias, scale, shift
            found = _differentiable_gradients(grad, inputs, needs, num_groups, eps, activation)
        else:
            found = _below_autograd(
                *(backward, grad, x, mean, rstd, num_groups, weight, bias, channel_bias),
                *(scale, shift, activation, *needs),
            )
        return None, *[f if needed else None for f, needed in zip(found, needs, strict=True)]


def _differentiable_gradients(grad, inputs, needs, num_groups, eps, activation):
    # Views, because one tensor may be passed as two arguments, each with a gradient of its own.
    x, weight, bias, channel_bias, scale, shift = views = [
        None if t is None else t.view_as(t) for t in inputs
    ]
    y = reference.group_norm_silu(
        x, num_groups, weight, bias, eps, channel_bias, scale, shift, ACTIVATIONS[activation]
    )
    wanted = [view for view, needed in zip(views, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]


# Function.apply without the part of it that is in Python, which looks for functorch's transforms:
# `_unsupported` has sent those to the reference.
_apply = super(torch.autograd.Function, _GroupNormSilu).apply


def _autograd(
    op, x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation, *, backward=None
):
    if backward is None:
        backward = _backward_op.triton if op is _op.triton else _backward_op.default
    call = [op, backward, num_groups, eps, activation]
    y = _apply(call, x, weight, bias, channel_bias, scale, shift)
    return y, *call


_op = _library.define(
    "group_norm_silu",
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? channel_bias, "
    "Tensor? scale, Tensor? shift, int activation) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    autograd=_autograd,
    reference=_reference,
    triton=_triton,
    check=_check,
)
_backward_op = _library.define(
    "group_norm_silu_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
    "Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, int activation, "
    "bool need_x, bool need_weight, bool need_bias, bool need_channel_bias, bool need_scale, "
    "bool need_shift) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    autograd=None,
    reference=_backward_reference,
    triton=_backward_triton,
    check=_check_backward,
)
