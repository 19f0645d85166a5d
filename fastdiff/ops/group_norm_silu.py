"""`group_norm_silu`: group normalization, time embedding and SiLU, fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff._backends import select_backend
from fastdiff.ops import _library
from fastdiff.reference import checks
from fastdiff.reference.group_norm_silu import (
    ACTIVATIONS,
    check_arguments,
    compute_dtype_of,
    group_norm_silu_backward,
    group_statistics,
    unchecked_group_norm_silu,
)
from fastdiff.reference.layout import memory_format_of

_Operands = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_OPERANDS = ("weight", "bias", "channel_bias", "scale", "shift")


class Arguments(NamedTuple):
    """The raw operator's arguments, in the order of its schema."""

    x: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    channel_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    activation: int
    """Position in ACTIVATIONS."""

    @property
    def operands(self) -> _Operands:
        return self.weight, self.bias, self.channel_bias, self.scale, self.shift


_SCHEMA = (
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? channel_bias, "
    "Tensor? scale, Tensor? shift, int activation) -> (Tensor, Tensor, Tensor)"
)


class BackwardArguments(NamedTuple):
    """The backward operator's arguments, in the order of its schema."""

    grad: Tensor
    x: Tensor
    mean: Tensor
    rstd: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    channel_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    activation: int
    need_x: bool
    need_weight: bool
    need_bias: bool
    need_channel_bias: bool
    need_scale: bool
    need_shift: bool

    @property
    def operands(self) -> _Operands:
        return self.weight, self.bias, self.channel_bias, self.scale, self.shift

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which gradients are needed: of x and of the operands."""
        return self[self._fields.index("need_x") :]


_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
    "Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, int activation, "
    "bool need_x, bool need_weight, bool need_bias, bool need_channel_bias, bool need_scale, "
    "bool need_shift) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

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
            f"group_norm_silu: unknown activation {checks.shown(activation)}; choose from "
            f"{', '.join(ACTIVATIONS)}"
        )
    arguments = (x, num_groups, weight, bias, eps, channel_bias, scale, shift, number)
    try:
        backend = select_backend("group_norm_silu", x, _unsupported(x))
    except AttributeError:  # not a tensor
        _check(Arguments(*arguments), check_range=False)
        raise
    if backend == "reference":  # without the statistics, which only a backward kernel needs
        a = Arguments(*arguments)
        _check(a, check_range=True)
        return _normalized(a)
    differentiable = (x, weight, bias, channel_bias, scale, shift)
    return _op.call(backend, arguments, differentiable)[0]


def _unsupported(x: Tensor) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    if x.dtype == torch.float64 and x.device.type != "cpu":
        return "float64 kernels exist on the CPU only"
    return _library.why_reference(x)


def _check(a: Arguments, *, check_range: bool) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    *arguments, activation = a
    checks.check_position("group_norm_silu", "activation", activation, ACTIVATIONS)
    check_arguments(*arguments)


def _check_backward(b: BackwardArguments, *, check_range: bool) -> None:
    op = "group_norm_silu"
    checks.check_position(op, "activation", b.activation, ACTIVATIONS)
    # The backward operator takes no eps; 1 passes the check.
    check_arguments(b.x, b.num_groups, b.weight, b.bias, 1.0, b.channel_bias, b.scale, b.shift)
    checks.check_like(op, "grad", b.grad, "x", b.x)
    shape, dtype = (b.x.shape[0], b.num_groups), compute_dtype_of(b.x)
    for name, given in (("mean", b.mean), ("rstd", b.rstd)):
        checks.check_operand(op, name, given, shape, "(B, G)", b.x.device)
        if given.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {given.dtype}, expected {dtype}")
    for name, operand, needed in zip(_OPERANDS, b.operands, b.needs[1:], strict=True):
        if needed and operand is None:
            raise ValueError(f"{op}: {name} is None, expected a tensor that can have a gradient")


def _empty_results(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    x, statistics = a.x, (a.x.shape[0], a.num_groups)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    mean, rstd = (x.new_empty(statistics, dtype=compute_dtype_of(x)) for _ in range(2))
    return y, mean, rstd


def _empty_gradients(b: BackwardArguments) -> _Gradients:
    """Memory for the gradients of x and the operands; (0,) for one that is not needed."""

    def gradient(needed: bool, like: Tensor | None, memory_format: torch.memory_format) -> Tensor:
        if not needed:
            return b.x.new_empty((0,))
        return torch.empty(
            like.shape, dtype=like.dtype, device=b.x.device, memory_format=memory_format
        )

    need_x, *needs = b.needs
    return (
        gradient(need_x, b.x, memory_format_of(b.x)),
        *(gradient(*pair, torch.contiguous_format) for pair in zip(needs, b.operands, strict=True)),
    )


def _fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_one_device(*a)
    return _empty_results(a)


def _fake_backward(b: BackwardArguments) -> _Gradients:
    checks.check_one_device(*b)
    return _empty_gradients(b)


def _normalized(a: Arguments) -> Tensor:
    *arguments, activation = a
    return unchecked_group_norm_silu(*arguments, ACTIVATIONS[activation])


def _reference(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = group_statistics(a.x, a.num_groups, a.eps, a.channel_bias)
    return _normalized(a), mean, rstd


def _reference_backward(b: BackwardArguments) -> _Gradients:
    results = _empty_gradients(b)
    gradients = group_norm_silu_backward(
        b.grad, b.x, b.mean, b.rstd, b.num_groups, *b.operands, ACTIVATIONS[b.activation]
    )
    for result, gradient, needed in zip(results, gradients, b.needs, strict=True):
        if needed:
            result.copy_(gradient)
    return results


def _channels_last(x: Tensor) -> bool:
    return memory_format_of(x) != torch.contiguous_format


def _adjacent(operand: Tensor | None) -> Tensor | None:
    """A small operand as kernels read it: any stride between samples, none between channels."""
    if operand is None or operand.shape[-1] <= 1 or operand.stride(-1) == 1:
        return operand
    return operand.contiguous()


def _triton(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    from fastdiff.triton_kernels import group_norm_silu as kernels

    _library.refuse_float64("group_norm_silu", a.x)
    results = _empty_results(a)
    kernels.group_norm_silu(
        *results,
        a.x.contiguous(memory_format=memory_format_of(a.x)),
        a.num_groups,
        _adjacent(a.weight),
        _adjacent(a.bias),
        a.eps,
        _adjacent(a.channel_bias),
        _adjacent(a.scale),
        _adjacent(a.shift),
        a.activation,
        _channels_last(a.x),
    )
    return results


def _triton_backward(b: BackwardArguments) -> _Gradients:
    from fastdiff.triton_kernels import group_norm_silu as kernels

    _library.refuse_float64("group_norm_silu", b.x)
    results = _empty_gradients(b)
    memory_format = memory_format_of(b.x)
    kernels.group_norm_silu_backward(
        *(result if needed else None for result, needed in zip(results, b.needs, strict=True)),
        b.grad.to(b.x.dtype).contiguous(memory_format=memory_format),
        b.x.contiguous(memory_format=memory_format),
        b.mean.contiguous(),
        b.rstd.contiguous(),
        b.num_groups,
        *(_adjacent(operand) for operand in b.operands),
        b.activation,
        _channels_last(b.x),
    )
    return results


class _GroupNormSilu(torch.autograd.Function):
    """Keeps x, the small operands, mean and rstd; the activation's input is recomputed.

    `csrc/bindings/dispatch.cpp` has the same node in C++, which runs instead where it is built.
    """

    @staticmethod
    def forward(ctx, op, backward, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, rstd = op(*arguments)
        a = Arguments(*arguments)
        ctx.save_for_backward(a.x, *a.operands, mean, rstd)
        ctx.backward_op = backward
        ctx.constants = a.num_groups, a.eps, a.activation
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, grad, _grad_mean, _grad_rstd):
        needed = Arguments(*ctx.needs_input_grad[2:])
        needs = (needed.x, *needed.operands)
        if grad is None:  # y was not used
            found = (None,) * len(needs)
        else:
            x, *operands, mean, rstd = ctx.saved_tensors
            num_groups, eps, activation = ctx.constants
            if torch.is_grad_enabled():  # create_graph: gradients that can be differentiated again
                inputs = (x, *operands)
                found = _differentiable_gradients(grad, inputs, needs, num_groups, eps, activation)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    found = ctx.backward_op(
                        grad, x, mean, rstd, num_groups, *operands, activation, *needs
                    )
        names = ("x", *_OPERANDS)
        grads = dict.fromkeys(Arguments._fields)
        grads.update((k, f) for k, f, n in zip(names, found, needs, strict=True) if n)
        return None, None, *grads.values()


def _differentiable_gradients(
    grad: Tensor,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    num_groups: int,
    eps: float,
    activation: int,
) -> list[Tensor | None]:
    """Gradients of x and the operands that can be differentiated again, from the reference.

    The node in C++ calls this too.
    """
    # Views, because one tensor may be passed as two arguments, each with a gradient of its own.
    x, weight, bias, channel_bias, scale, shift = views = [
        None if t is None else t.view_as(t) for t in inputs
    ]
    y = _normalized(
        Arguments(x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation)
    )
    wanted = [view for view, needed in zip(views, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _autograd(
    op: Callable, *arguments: object, backward: Callable | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if backward is None:
        backward = _backward_op.triton if op is _op.triton else _backward_op.default
    return _GroupNormSilu.apply(op, backward, *arguments)


_op = _library.define(
    "group_norm_silu",
    _SCHEMA,
    Arguments,
    fake=_fake,
    autograd=_autograd,
    reference=_reference,
    triton=_triton,
    check=_check,
)
_backward_op = _library.define(
    "group_norm_silu_backward",
    _BACKWARD_SCHEMA,
    BackwardArguments,
    fake=_fake_backward,
    autograd=None,
    reference=_reference_backward,
    triton=_triton_backward,
    check=_check_backward,
)
