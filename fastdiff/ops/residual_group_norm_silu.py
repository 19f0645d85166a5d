"""`residual_group_norm_silu`: a residual connection's sum and the `group_norm_silu` behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff._backends import select_backend
from fastdiff.ops import _library
from fastdiff.ops._group_norm import (
    adjacent,
    check_needs,
    check_statistics,
    empty_gradients,
    empty_statistics,
    is_channels_last,
    unsupported,
)
from fastdiff.reference import checks
from fastdiff.reference.group_norm_silu import (
    ACTIVATIONS,
    check_arguments,
    check_summands,
    compute_dtype_of,
    group_norm_silu_backward,
    group_statistics,
    residual_sum,
    unchecked_group_norm_silu,
)
from fastdiff.reference.layout import memory_format_of

_OP = "residual_group_norm_silu"
_Results = tuple[Tensor, Tensor, Tensor, Tensor]
_OPERANDS = ("weight", "bias", "scale", "shift", "sum_bias")


class Arguments(NamedTuple):
    """The raw operator's arguments, in the order of its schema."""

    x: Tensor
    residual: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    scale: Tensor | None
    shift: Tensor | None
    activation: int
    """Position in ACTIVATIONS."""
    sum_bias: Tensor | None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.scale, self.shift, self.sum_bias


_SCHEMA = (
    "(Tensor x, Tensor residual, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? scale, Tensor? shift, int activation, Tensor? sum_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class BackwardArguments(NamedTuple):
    """The backward operator's arguments, in the order of its schema."""

    grad: Tensor
    """Of y."""
    grad_sum: Tensor | None
    sum: Tensor
    mean: Tensor
    rstd: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    activation: int
    sum_bias: Tensor | None
    need_x: bool
    """Of x or residual, whose gradients are the same."""
    need_weight: bool
    need_bias: bool
    need_scale: bool
    need_shift: bool
    need_sum_bias: bool

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.scale, self.shift, self.sum_bias

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which gradients are needed: of x and of the operands."""
        return self[self._fields.index("need_x") :]


_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, int num_groups, "
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int activation, "
    "Tensor? sum_bias, bool need_x, bool need_weight, bool need_bias, bool need_scale, "
    "bool need_shift, bool need_sum_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def residual_group_norm_silu(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    *,
    sum_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""sum = x + residual + sum_bias and y = act(norm(sum) (1 + scale) + shift), fused.

    What stands between two residual blocks: the end of one's residual connection and the
    normalization at the next one's start (`group_norm_silu` has the formula). The sum is taken in
    float32 (float64 for float64 x), rounded once to the dtype of x, and normalized as it was
    rounded: y is, bit for bit, `group_norm_silu(sum, ...)`.

    The backward pass adds the gradient that comes to `sum` from elsewhere, such as the next
    residual connection, to the norm's own before it rounds: there is no pass that accumulates
    gradients. Kept for it are sum, the small operands, mean and rstd (B, G).

    Parameters
    ----------
    x, residual
        (B, C, \*spatial) with 1 to 3 spatial dimensions, of one floating-point dtype, contiguous or
        channels_last; other strides work through a copy. The format of x decides.
    num_groups, weight, bias, eps, scale, shift, activation
        As in `group_norm_silu`.
    sum_bias
        (C,), floating point, or None for zeros: the biases of the convolutions that made x and
        residual.

    Returns
    -------
    sum, y : Tensor
        Shape, dtype and memory format of x. Differentiable in all tensors, any number of times, as
        is `group_norm_silu`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.

    Examples
    --------
    >>> import torch, fastdiff
    >>> x, residual = torch.randn(2, 4, 64, 16, 16).unbind()
    >>> h, y = fastdiff.ops.residual_group_norm_silu(x, residual, 32, None, None)
    >>> torch.equal(h, x + residual)
    True
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"{_OP}: unknown activation {checks.shown(activation)}; choose from "
            f"{', '.join(ACTIVATIONS)}"
        )
    number = ACTIVATIONS.index(activation)
    arguments = (x, residual, num_groups, weight, bias, eps, scale, shift, number, sum_bias)
    try:
        backend = select_backend(_OP, x, unsupported(x))
    except AttributeError:  # not a tensor
        _check(Arguments(*arguments), check_range=False)
        raise
    if backend == "reference":  # without the statistics, which only a backward kernel needs
        a = Arguments(*arguments)
        _check(a, check_range=True)
        summed = residual_sum(x, residual, sum_bias)
        return summed.to(x.dtype), _normalized(a, summed).to(x.dtype)
    differentiable = (x, residual, weight, bias, scale, shift, sum_bias)
    return _op.call(backend, arguments, differentiable)[:2]


def _check(a: Arguments, *, check_range: bool) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    checks.check_position(_OP, "activation", a.activation, ACTIVATIONS)
    check_arguments(a.x, a.num_groups, a.weight, a.bias, a.eps, None, a.scale, a.shift, op=_OP)
    check_summands(a.x, a.residual, a.sum_bias)


def _check_backward(b: BackwardArguments, *, check_range: bool) -> None:
    checks.check_position(_OP, "activation", b.activation, ACTIVATIONS)
    # The backward operator takes no eps; 1 passes the check.
    check_arguments(b.sum, b.num_groups, b.weight, b.bias, 1.0, None, b.scale, b.shift, op=_OP)
    check_summands(b.sum, b.sum, b.sum_bias)
    checks.check_like(_OP, "grad", b.grad, "sum", b.sum)
    if b.grad_sum is not None:
        checks.check_like(_OP, "grad_sum", b.grad_sum, "sum", b.sum)
    check_statistics(_OP, b.sum, b.num_groups, b.mean, b.rstd)
    check_needs(_OP, _OPERANDS, b.operands, b.needs[1:])


def _empty_results(a: Arguments) -> _Results:
    x, memory_format = a.x, memory_format_of(a.x)
    summed, y = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
        for _ in range(2)
    )
    return summed, y, *empty_statistics(x, a.num_groups)


def _fake(a: Arguments) -> _Results:
    checks.check_one_device(*a)
    return _empty_results(a)


def _fake_backward(b: BackwardArguments) -> tuple[Tensor, ...]:
    checks.check_one_device(b.sum, *b)
    return empty_gradients(b.sum, b.operands, b.needs)


def _normalized(a: Arguments, summed: Tensor) -> Tensor:
    return unchecked_group_norm_silu(
        summed, a.num_groups, a.weight, a.bias, a.eps, None, a.scale, a.shift,
        ACTIVATIONS[a.activation],
    )  # fmt: skip


def _reference(a: Arguments) -> _Results:
    summed, dtype = residual_sum(a.x, a.residual, a.sum_bias), a.x.dtype
    statistics = group_statistics(summed, a.num_groups, a.eps)
    return summed.to(dtype), _normalized(a, summed).to(dtype), *statistics


def _reference_backward(b: BackwardArguments) -> tuple[Tensor, ...]:
    results = empty_gradients(b.sum, b.operands, b.needs)
    grad_x, weight, bias, _, scale, shift = group_norm_silu_backward(
        b.grad, b.sum, b.mean, b.rstd, b.num_groups, b.weight, b.bias, None, b.scale, b.shift,
        ACTIVATIONS[b.activation],
    )  # fmt: skip
    if b.grad_sum is not None:
        grad_x = grad_x + b.grad_sum.to(grad_x.dtype)
    gradients = grad_x, weight, bias, scale, shift, _over_channels(grad_x)
    for result, gradient, needed in zip(results, gradients, b.needs, strict=True):
        if needed:
            result.copy_(gradient)
    return results


def _over_channels(grad: Tensor) -> Tensor:
    """(C,): the gradient of a bias per channel."""
    return grad.flatten(2).sum((0, 2))


def _triton(a: Arguments) -> _Results:
    from fastdiff.triton_kernels import group_norm_silu as kernels

    _library.refuse_float64(_OP, a.x)
    results = summed, *others = _empty_results(a)
    memory_format = memory_format_of(a.x)
    kernels.group_norm_silu(
        *others,
        a.x.contiguous(memory_format=memory_format),
        a.num_groups,
        adjacent(a.weight),
        adjacent(a.bias),
        a.eps,
        None,
        adjacent(a.scale),
        adjacent(a.shift),
        a.activation,
        is_channels_last(a.x),
        residual=a.residual.contiguous(memory_format=memory_format),
        sum_bias=adjacent(a.sum_bias),
        summed=summed,
    )
    return results


def _triton_backward(b: BackwardArguments) -> tuple[Tensor, ...]:
    from fastdiff.triton_kernels import group_norm_silu as kernels

    _library.refuse_float64(_OP, b.sum)
    results = empty_gradients(b.sum, b.operands, b.needs)
    memory_format = memory_format_of(b.sum)

    def ready(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(b.sum.dtype).contiguous(memory_format=memory_format)

    grad_x, weight, bias, scale, shift, sum_bias = (
        result if needed else None for result, needed in zip(results, b.needs, strict=True)
    )
    if sum_bias is not None and grad_x is None:  # kernels add it up where they write that of x
        grad_x = torch.empty_like(b.sum, memory_format=memory_format)
    kernels.group_norm_silu_backward(
        grad_x, weight, bias, None, scale, shift,
        ready(b.grad),
        ready(b.sum),
        b.mean.contiguous(),
        b.rstd.contiguous(),
        b.num_groups,
        adjacent(b.weight),
        adjacent(b.bias),
        None,
        adjacent(b.scale),
        adjacent(b.shift),
        b.activation,
        is_channels_last(b.sum),
        grad_sum=ready(b.grad_sum),
        grad_sum_bias=sum_bias,
    )  # fmt: skip
    return results


class _ResidualGroupNormSilu(torch.autograd.Function):
    """Keeps the sum, the small operands, mean and rstd; the activation's input is recomputed.

    `csrc/bindings/dispatch.cpp` has the same node in C++, which runs instead where it is built.
    """

    @staticmethod
    def forward(ctx, op, backward, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            summed, y, mean, rstd = op(*arguments)
        a = Arguments(*arguments)
        ctx.save_for_backward(summed, *a.operands, mean, rstd)
        ctx.backward_op = backward
        ctx.constants = a.num_groups, a.eps, a.activation
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return summed, y, mean, rstd

    @staticmethod
    def backward(ctx, grad_sum, grad, _grad_mean, _grad_rstd):
        needed = Arguments(*ctx.needs_input_grad[2:])
        needs = (needed.x or needed.residual, *needed.operands)
        summed, *operands, mean, rstd = ctx.saved_tensors
        num_groups, eps, activation = ctx.constants
        if grad is None or torch.is_grad_enabled():
            found = _differentiable_gradients(
                grad, grad_sum, (summed, *operands), needs, num_groups, eps, activation
            )
        else:
            *of_norm, sum_bias = operands
            with torch._C._AutoDispatchBelowAutograd():
                found = ctx.backward_op(
                    grad, grad_sum, summed, mean, rstd, num_groups, *of_norm, activation, sum_bias,
                    *needs,
                )  # fmt: skip
        grads = dict(zip(("x", *_OPERANDS), found, strict=True))
        grads["residual"] = grads["x"]
        return (
            None,
            None,
            *(grads.get(k) if n else None for k, n in zip(needed._fields, needed, strict=True)),
        )


def _differentiable_gradients(
    grad: Tensor | None,
    grad_sum: Tensor | None,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    num_groups: int,
    eps: float,
    activation: int,
) -> list[Tensor | None]:
    """Gradients of the summands and the operands, from the reference: where they have to be
    differentiable again (create_graph), and where y was not used (no `grad`).

    The node in C++ calls this too. `inputs`: the sum, then the operands.
    """
    if grad is None and grad_sum is None:
        return [None] * len(needs)
    need_x, *need_operands, need_sum_bias = needs
    sum_bias = inputs[-1]
    of_x, found = grad_sum, [None] * len(need_operands)
    if grad is not None:
        # Views, because one tensor may be passed as two arguments, each with a gradient of its own.
        views = [None if t is None else t.view_as(t) for t in inputs[:-1]]
        summed, weight, bias, scale, shift = views
        y = unchecked_group_norm_silu(
            summed, num_groups, weight, bias, eps, None, scale, shift, ACTIVATIONS[activation]
        )
        wanted = (need_x or need_sum_bias, *need_operands)
        found = iter(
            torch.autograd.grad(
                y, [v for v, n in zip(views, wanted, strict=True) if n], grad, create_graph=True
            )
        )
        of_x, *found = (next(found) if n else None for n in wanted)
        if of_x is not None and grad_sum is not None:
            of_x = of_x + grad_sum
    of_sum_bias = None
    if need_sum_bias:
        of_sum_bias = _over_channels(of_x.to(compute_dtype_of(of_x))).to(sum_bias.dtype)
    return [of_x if need_x else None, *found, of_sum_bias]


def _autograd(op: Callable, *arguments: object, backward: Callable | None = None) -> _Results:
    if backward is None:
        backward = _backward_op.triton if op is _op.triton else _backward_op.default
    return _ResidualGroupNormSilu.apply(op, backward, *arguments)


_op = _library.define(
    _OP,
    _SCHEMA,
    Arguments,
    fake=_fake,
    autograd=_autograd,
    reference=_reference,
    triton=_triton,
    check=_check,
)
_backward_op = _library.define(
    f"{_OP}_backward",
    _BACKWARD_SCHEMA,
    BackwardArguments,
    fake=_fake_backward,
    autograd=None,
    reference=_reference_backward,
    triton=_triton_backward,
    check=_check_backward,
)
