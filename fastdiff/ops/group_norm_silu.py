"""`group_norm_silu`: group normalization, time embedding and SiLU, fused."""

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
from fastdiff.reference.dropout import Dropout
from fastdiff.reference.group_norm_silu import (
    ACTIVATIONS,
    check_arguments,
    check_dropout,
    group_norm_silu_backward,
    group_statistics,
    make_dropout,
    normalized_with,
    unchecked_group_norm_silu,
)
from fastdiff.reference.layout import memory_format_of

_Operands = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_OPERANDS = ("weight", "bias", "channel_bias", "scale", "shift")


class Arguments(NamedTuple):
    """The arguments of the raw operators, in the order of their schemas: the one without dropout
    has none of the last four."""

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
    threshold: int | None = None
    keys: Tensor | None = None
    seed: int | None = None
    stream: int = 0

    @property
    def operands(self) -> _Operands:
        return self.weight, self.bias, self.channel_bias, self.scale, self.shift

    @property
    def dropout(self) -> Dropout | None:
        return None if self.threshold is None else Dropout(*self[-len(Dropout._fields) :])


_SCHEMA = (
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? channel_bias, "
    "Tensor? scale, Tensor? shift, int activation{}) -> (Tensor, Tensor, Tensor)"
)
_DROPOUT_SCHEMA = ", int threshold, Tensor? keys, SymInt? seed, SymInt stream"


class BackwardArguments(NamedTuple):
    """The arguments of the backward operators, in the order of their schemas."""

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
    threshold: int | None = None
    keys: Tensor | None = None
    seed: int | None = None
    stream: int = 0

    @property
    def operands(self) -> _Operands:
        return self.weight, self.bias, self.channel_bias, self.scale, self.shift

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which gradients are needed: of x and of the operands."""
        first = self._fields.index("need_x")
        return self[first : first + 1 + len(_OPERANDS)]

    @property
    def dropout(self) -> Dropout | None:
        return None if self.threshold is None else Dropout(*self[-len(Dropout._fields) :])


_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
    "Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, int activation, "
    "bool need_x, bool need_weight, bool need_bias, bool need_channel_bias, bool need_scale, "
    "bool need_shift{}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Tensor:
    r"""y = dropout(act(norm(x + channel_bias) (1 + scale) + shift)), and its gradients, fused.

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
    dropout_p
        Probability with which an element of the result is 0, in [0, 1). It is rounded to a multiple
        p of 1/256, from 1/256 to 255/256 unless it is 0, and the elements that are kept are
        multiplied with 1 / (1 - p): the expectation is exact. The mask is a function of (key of the
        sample, stream, channel, pixel) (Math §9): never stored, but made again in the backward
        pass, and the same on every backend, in every memory format and however a batch is split.
    seed
        Of the mask: an int, or int64 keys (B,), as in `q_sample`. Needed where dropout_p > 0, not
        looked at otherwise.
    stream
        Separates uses of one seed, the layers of a network above all.
    mean, rstd
        (B, G), floating point: normalize with these in place of the statistics of x, as a part of a
        larger image (`group_norm_statistics`). Both or none; `eps` is in rstd already. Computed in
        plain PyTorch on all backends, and differentiable in them too.

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
    if mean is not None or rstd is not None:
        given = weight, bias, channel_bias, scale, shift
        return _with_statistics(x, num_groups, mean, rstd, given, activation, dropout_p)
    op, arguments = _op, (x, num_groups, weight, bias, eps, channel_bias, scale, shift, number)
    if dropout_p != 0 and (dropout := make_dropout(dropout_p, seed, stream)) is not None:
        op, arguments = _dropout_op, (*arguments, *dropout)
    try:
        backend = select_backend("group_norm_silu", x, unsupported(x))
    except AttributeError:  # not a tensor
        _check(Arguments(*arguments), check_range=False)
        raise
    if backend == "reference":  # without the statistics, which only a backward kernel needs
        a = Arguments(*arguments)
        _check(a, check_range=True)
        return _normalized(a)
    differentiable = (x, weight, bias, channel_bias, scale, shift)
    return op.call(backend, arguments, differentiable)[0]


def _with_statistics(
    x: Tensor,
    num_groups: int,
    mean: Tensor | None,
    rstd: Tensor | None,
    operands: _Operands,
    activation: str,
    dropout_p: float,
) -> Tensor:
    weight, bias, channel_bias, scale, shift = operands
    check_arguments(x, num_groups, weight, bias, 1.0, channel_bias, scale, shift)
    for name, given in (("mean", mean), ("rstd", rstd)):
        if given is None:
            raise ValueError(
                f"group_norm_silu: {name} is None, expected both mean and rstd or none"
            )
        shape = x.shape[0], num_groups
        checks.check_operand("group_norm_silu", name, given, shape, "(B, G)", x.device)
    if dropout_p:
        raise ValueError("group_norm_silu: dropout_p is given, expected none with mean and rstd")
    return normalized_with(x, num_groups, mean, rstd, *operands, activation)


def _check(a: Arguments, *, check_range: bool) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    checks.check_position("group_norm_silu", "activation", a.activation, ACTIVATIONS)
    check_arguments(a.x, a.num_groups, a.weight, a.bias, a.eps, a.channel_bias, a.scale, a.shift)
    if a.dropout is not None:
        check_dropout(a.x, a.dropout)


def _check_backward(b: BackwardArguments, *, check_range: bool) -> None:
    op = "group_norm_silu"
    checks.check_position(op, "activation", b.activation, ACTIVATIONS)
    # The backward operator takes no eps; 1 passes the check.
    check_arguments(b.x, b.num_groups, b.weight, b.bias, 1.0, b.channel_bias, b.scale, b.shift)
    checks.check_like(op, "grad", b.grad, "x", b.x)
    check_statistics(op, b.x, b.num_groups, b.mean, b.rstd)
    check_needs(op, _OPERANDS, b.operands, b.needs[1:])
    if b.dropout is not None:
        check_dropout(b.x, b.dropout)


def _empty_results(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    x = a.x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    return y, *empty_statistics(x, a.num_groups)


def _fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_one_device(*a)
    return _empty_results(a)


def _fake_backward(b: BackwardArguments) -> _Gradients:
    checks.check_one_device(*b)
    return empty_gradients(b.x, b.operands, b.needs)


def _normalized(a: Arguments) -> Tensor:
    arguments = (a.x, a.num_groups, a.weight, a.bias, a.eps, a.channel_bias, a.scale, a.shift)
    return unchecked_group_norm_silu(*arguments, ACTIVATIONS[a.activation], a.dropout)


def _reference(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = group_statistics(a.x, a.num_groups, a.eps, a.channel_bias)
    return _normalized(a), mean, rstd


def _reference_backward(b: BackwardArguments) -> _Gradients:
    results = empty_gradients(b.x, b.operands, b.needs)
    gradients = group_norm_silu_backward(
        b.grad, b.x, b.mean, b.rstd, b.num_groups, *b.operands, ACTIVATIONS[b.activation], b.dropout
    )
    for result, gradient, needed in zip(results, gradients, b.needs, strict=True):
        if needed:
            result.copy_(gradient)
    return results


def _ready(dropout: Dropout | None) -> Dropout | None:
    """Dropout as kernels read it: adjacent keys."""
    if dropout is None or dropout.keys is None:
        return dropout
    return dropout._replace(keys=dropout.keys.contiguous())


def _triton(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    from fastdiff.triton_kernels import group_norm_silu as kernels

    _library.refuse_float64("group_norm_silu", a.x)
    results = _empty_results(a)
    kernels.group_norm_silu(
        *results,
        a.x.contiguous(memory_format=memory_format_of(a.x)),
        a.num_groups,
        adjacent(a.weight),
        adjacent(a.bias),
        a.eps,
        adjacent(a.channel_bias),
        adjacent(a.scale),
        adjacent(a.shift),
        a.activation,
        is_channels_last(a.x),
        dropout=_ready(a.dropout),
    )
    return results


def _triton_backward(b: BackwardArguments) -> _Gradients:
    from fastdiff.triton_kernels import group_norm_silu as kernels

    _library.refuse_float64("group_norm_silu", b.x)
    results = empty_gradients(b.x, b.operands, b.needs)
    memory_format = memory_format_of(b.x)
    kernels.group_norm_silu_backward(
        *(result if needed else None for result, needed in zip(results, b.needs, strict=True)),
        b.grad.to(b.x.dtype).contiguous(memory_format=memory_format),
        b.x.contiguous(memory_format=memory_format),
        b.mean.contiguous(),
        b.rstd.contiguous(),
        b.num_groups,
        *(adjacent(operand) for operand in b.operands),
        b.activation,
        is_channels_last(b.x),
        dropout=_ready(b.dropout),
    )
    return results


class _GroupNormSilu(torch.autograd.Function):
    """Keeps x, the small operands, mean and rstd; the activation's input and dropout's mask are
    recomputed.

    `csrc/bindings/dispatch.cpp` has the same node in C++, which runs instead where it is built.
    """

    @staticmethod
    def forward(ctx, op, backward, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, rstd = op(*arguments)
        a = Arguments(*arguments)
        ctx.save_for_backward(a.x, *a.operands, mean, rstd, a.keys)
        ctx.backward_op = backward
        ctx.constants = a.num_groups, a.eps, a.activation
        ctx.dropout = a.dropout and a.dropout._replace(keys=None)
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
            x, *operands, mean, rstd, keys = ctx.saved_tensors
            num_groups, eps, activation = ctx.constants
            dropout = ctx.dropout and ctx.dropout._replace(keys=keys)
            if torch.is_grad_enabled():  # create_graph: gradients that can be differentiated again
                found = _differentiable_gradients(
                    grad, (x, *operands), needs, num_groups, eps, activation, *(dropout or ())
                )
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    found = ctx.backward_op(
                        grad, x, mean, rstd, num_groups, *operands, activation, *needs,
                        *(dropout or ()),
                    )  # fmt: skip
        names = ("x", *_OPERANDS)
        grads = dict.fromkeys(Arguments._fields[: len(ctx.needs_input_grad) - 2])
        grads.update((k, f) for k, f, n in zip(names, found, needs, strict=True) if n)
        return None, None, *grads.values()


def _differentiable_gradients(
    grad: Tensor,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    num_groups: int,
    eps: float,
    activation: int,
    *dropout: object,
) -> list[Tensor | None]:
    """Gradients of x and the operands that can be differentiated again, from the reference.

    The node in C++ calls this too.
    """
    # Views, because one tensor may be passed as two arguments, each with a gradient of its own.
    x, weight, bias, channel_bias, scale, shift = views = [
        None if t is None else t.view_as(t) for t in inputs
    ]
    y = _normalized(
        Arguments(
            x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation, *dropout
        )
    )
    wanted = [view for view, needed in zip(views, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _autograd(
    op: Callable, *arguments: object, backward: Callable | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if backward is None:
        of = _backward_op if len(arguments) == _PLAIN else _dropout_backward_op
        backward = of.triton if op._overloadname == "triton" else of.default
    return _GroupNormSilu.apply(op, backward, *arguments)


_PLAIN = Arguments._fields.index("threshold")


def _define(suffix: str, dropout: str) -> tuple[_library.Op, _library.Op]:
    return _library.define(
        f"group_norm_silu{suffix}",
        _SCHEMA.format(dropout),
        Arguments,
        fake=_fake,
        autograd=_autograd,
        reference=_reference,
        triton=_triton,
        check=_check,
    ), _library.define(
        f"group_norm_silu{suffix}_backward",
        _BACKWARD_SCHEMA.format(dropout),
        BackwardArguments,
        fake=_fake_backward,
        autograd=None,
        reference=_reference_backward,
        triton=_triton_backward,
        check=_check_backward,
    )


# Of their own, so that a call without dropout hands over no more than it has to.
_op, _backward_op = _define("", "")
_dropout_op, _dropout_backward_op = _define("_dropout", _DROPOUT_SCHEMA)
