"""`vlb_terms`: one term of the variational bound per sample, with the errors of x0 and eps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff._backends import select_backend
from fastdiff.diffusion.step_tables import LEARNED_VARIANCES, VARIANCES
from fastdiff.ops import _library
from fastdiff.reference import checks
from fastdiff.reference.layout import memory_format_of
from fastdiff.reference.step_columns import NUM_STEP_COLUMNS, PREDICTIONS


class Arguments(NamedTuple):
    """The raw operator's arguments, in the order of its schema."""

    x0: Tensor
    x_t: Tensor
    model_output: Tensor
    t: Tensor
    table: Tensor
    noise: Tensor | None
    keys: Tensor | None
    seed: int | None
    stream: int
    prediction: int
    """Position in PREDICTIONS."""
    learned: bool
    """Whether the output has variance channels."""
    clip: bool
    detach_mean: bool


_NUM_TENSORS = Arguments._fields.index("seed")  # tensors come first

_SCHEMA = (
    "Tensor x0, Tensor x_t, Tensor model_output, Tensor t, Tensor table, Tensor? noise, "
    "Tensor? keys, SymInt? seed, SymInt stream, int prediction, bool learned, bool clip, "
    "bool detach_mean"
)


class BackwardArguments(NamedTuple):
    """The arguments of the backward operator, which has the forward one's among its own."""

    grad: Tensor
    forward: Arguments

    @classmethod
    def from_schema(cls, grad: Tensor, *forward: object) -> BackwardArguments:
        return cls(grad, Arguments(*forward))


def vlb_terms(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
    detach_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_{t-1} = KL(q(x_{t-1}|x_t,x0) || p(x_{t-1}|x_t)), at t = 0 L_0 = -log p(x0|x_1), per sample.

    In bits per dimension (DDPM eqs. 5 and 13, Math §6), with the mean squared errors of the
    predicted x0 and eps, all from one pass over the data. L_0 is the discretized Gaussian decoder:
    256 levels in [-1, 1], half-width 1/255, the outer bins infinite, with exact normal
    probabilities (published code approximates them), accurate in both tails. Sums are float32
    whatever the dtype of the tensors, taken in a fixed order that does not depend on the batch.

    Parameters
    ----------
    x0
        (B, C, ...), floating point; where t = 0 it should hold pixel levels 2 k / 255 - 1, which
        bfloat16 rounds by up to half a bin.
    x_t
        Same shape, floating point. Contiguous or channels_last; other strides work through a copy.
    model_output
        (B, C, ...); (B, 2C, ...) for learned variances, read in place.
    t
        (B,) int64, 0-based timesteps: the row of `table` for each sample.
    table
        (T, K) float32: `NoiseSchedule.ddpm_table(torch.arange(T), variance)`.
    noise
        Same shape as x_t: the noise in x_t, which the error of eps is taken against. Exclusive
        with `seed`; one of them is needed.
    seed, stream
        What `q_sample` made the noise from (an int, or int64 keys (B,)). The kernel regenerates
        the noise, which never touches memory.
    prediction
        What the network predicts: "eps", "x0", "v" or "mean".
    variance
        "fixed_large", "fixed_small", "learned" or "learned_range", as the table was built for.
    clip
        Clip the predicted x0 to [-1, 1], as samplers do and as bounds are reported; its mean and
        eps follow. Train with clip=False: clipped elements give the network no gradient.
    detach_mean
        Give no gradient to the prediction, only to the variance channels (L_vlb in IDDPM's hybrid
        loss, eq. 16). The values do not change.

    Returns
    -------
    tuple of Tensor
        kl (bits/dim), x0_mse, eps_mse; each (B,) float32 (float64 if x0, x_t or model_output is).
        Differentiable in model_output; in x0, x_t and noise on the reference. Under autocast
        nothing is cast.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.
    IndexError
        t outside 0..T-1 on the CPU, and on CUDA under FASTDIFF_DEBUG=1 (without it such samples
        come out as NaN).

    Examples
    --------
    >>> import torch, fastdiff
    >>> schedule = fastdiff.NoiseSchedule.linear(1000)
    >>> table = schedule.ddpm_table(torch.arange(1000), variance="fixed_small")
    >>> x0 = torch.randint(256, (4, 3, 8, 8)) / 127.5 - 1
    >>> t = torch.tensor([0, 1, 500, 999])
    >>> tables = schedule.tables("cpu")
    >>> x_t = fastdiff.ops.q_sample(
    ...     x0, t, tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar, seed=0
    ... )
    >>> kl, x0_mse, eps_mse = fastdiff.ops.vlb_terms(
    ...     x0, x_t, torch.zeros_like(x_t), t, table, seed=0, variance="fixed_small"
    ... )
    """
    if (noise is None) == (seed is None):
        given = "neither" if noise is None else "both"
        raise ValueError(f"vlb_terms: pass either noise or seed; {given} was given")
    checks.check_name("vlb_terms", "prediction", prediction, PREDICTIONS)
    checks.check_name("vlb_terms", "variance", variance, VARIANCES)
    keys, integer = checks.split_seed("vlb_terms", seed)
    arguments = (
        x0,
        x_t,
        model_output,
        t,
        table,
        noise,
        keys,
        integer,
        checks.as_int64("vlb_terms", "stream", stream),
        PREDICTIONS.index(prediction),
        variance in LEARNED_VARIANCES,
        clip,
        detach_mean,
    )
    try:
        unsupported = _unsupported(x0, x_t, model_output, table, noise)
        backend = select_backend("vlb_terms", x_t, unsupported)
    except AttributeError:  # not a tensor
        _check(Arguments(*arguments), check_range=False)
        raise
    found = _op.call(backend, arguments, (model_output,))
    return found.unbind() if isinstance(found, Tensor) else found


def _unsupported(
    x0: Tensor, x_t: Tensor, model_output: Tensor, table: Tensor, noise: Tensor | None
) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    if torch.float64 in (x0.dtype, x_t.dtype, model_output.dtype, table.dtype):
        return "there are no float64 kernels"
    if (reason := _library.why_reference(x0)) is not None:
        return reason
    if torch.is_grad_enabled() and _needs_more_gradients(x0, x_t, table, noise):
        return "kernels differentiate in model_output alone"
    return None


def _needs_more_gradients(*inputs: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in inputs)


def _check(a: Arguments, *, check_range: bool) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    op = "vlb_terms"
    for name in ("x0", "x_t", "model_output", "t", "table"):
        checks.check_tensor(op, name, getattr(a, name))
    checks.check_noise_source(op, a.noise, a.keys, a.seed, required=True)
    checks.check_position(op, "prediction", a.prediction, PREDICTIONS)
    checks.check_flags(op, learned=a.learned, clip=a.clip, detach_mean=a.detach_mean)
    checks.check_float(op, "x_t", a.x_t.dtype)
    if a.x_t.dim() < 2:
        raise ValueError(f"{op}: x_t has shape {tuple(a.x_t.shape)}, expected (B, C, ...)")
    checks.check_like(op, "x0", a.x0, "x_t", a.x_t)
    checks.check_float(op, "model_output", a.model_output.dtype)
    device = a.x_t.device
    batch, channels, *rest = a.x_t.shape
    expected = (batch, 2 * channels if a.learned else channels, *rest)
    if tuple(a.model_output.shape) != expected:
        kind = "with" if a.learned else "without"
        raise ValueError(
            f"{op}: model_output has shape {tuple(a.model_output.shape)}, expected {expected}, "
            f"{kind} variance channels, for x_t of shape {tuple(a.x_t.shape)}"
        )
    checks.check_device(op, "model_output", a.model_output.device, device)
    if a.noise is not None:
        checks.check_like(op, "noise", a.noise, "x_t", a.x_t)
    if a.keys is not None:
        checks.check_per_sample(op, "seed", a.keys, torch.int64, batch, device)
    if a.table.dim() != 2 or a.table.shape[1] != NUM_STEP_COLUMNS:
        raise ValueError(
            f"{op}: table has shape {tuple(a.table.shape)}, expected (T, {NUM_STEP_COLUMNS}) from "
            "NoiseSchedule.ddpm_table"
        )
    if a.table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: table has dtype {a.table.dtype}, expected torch.float32")
    checks.check_device(op, "table", a.table.device, device)
    checks.check_per_sample(op, "t", a.t, torch.int64, batch, device)
    if check_range:
        checks.check_timestep_range(op, a.t, a.table.shape[0])


def _check_backward(b: BackwardArguments, *, check_range: bool) -> None:
    _check(b.forward, check_range=check_range)
    x_t = b.forward.x_t
    shape = (3, x_t.shape[0])
    checks.check_operand("vlb_terms", "grad", b.grad, shape, "that of the terms", x_t.device)


def _empty_result(a: Arguments) -> Tensor:
    wide = torch.float64 in (a.x0.dtype, a.x_t.dtype, a.model_output.dtype)
    dtype = torch.float64 if wide else torch.float32
    return a.x_t.new_empty((3, a.x_t.shape[0]), dtype=dtype)


def _empty_gradient(a: Arguments) -> Tensor:
    return torch.empty(
        a.model_output.shape,
        dtype=a.model_output.dtype,
        device=a.model_output.device,
        memory_format=memory_format_of(a.x_t),
    )


def _fake(a: Arguments) -> Tensor:
    checks.check_one_device(a.x_t, *a)
    return _empty_result(a)


def _fake_backward(b: BackwardArguments) -> Tensor:
    checks.check_one_device(b.grad, *b.forward)
    return _empty_gradient(b.forward)


def _reference(a: Arguments) -> Tensor:
    return torch.stack(
        reference.vlb_terms(
            a.x0,
            a.x_t,
            a.model_output,
            a.t,
            a.table,
            noise=a.noise,
            seed=_library.joined_seed(a),
            stream=a.stream,
            prediction=PREDICTIONS[a.prediction],
            learned=a.learned,
            clip=a.clip,
            detach_mean=a.detach_mean,
        )
    )


def _reference_backward(b: BackwardArguments) -> Tensor:
    gradient = _empty_gradient(b.forward)
    with _library.recording():
        output = b.forward.model_output.detach().requires_grad_()
        terms = _reference(b.forward._replace(model_output=output))
        if terms.requires_grad:  # not with detach_mean and a fixed variance
            gradient.copy_(torch.autograd.grad(terms, output, b.grad)[0])
        else:
            gradient.zero_()
    return gradient


def _triton_inputs(a: Arguments) -> tuple:
    """What the Triton kernels read: dense, in x_t's memory format."""
    memory_format = memory_format_of(a.x_t)

    def dense(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous(memory_format=memory_format)

    dense_arguments = a._replace(
        x0=dense(a.x0),
        x_t=dense(a.x_t),
        model_output=dense(a.model_output),
        t=a.t.contiguous(),
        table=a.table.contiguous(),
        noise=dense(a.noise),
        keys=_library.contiguous(a.keys),
    )
    return *dense_arguments, memory_format != torch.contiguous_format


def _refuse_float64(a: Arguments) -> None:
    _library.refuse_float64("vlb_terms", a.x0, a.x_t, a.model_output, a.table)


def _triton(a: Arguments) -> Tensor:
    from fastdiff.triton_kernels import vlb_terms as kernels

    _refuse_float64(a)
    terms = _empty_result(a)
    kernels.vlb_terms(terms, *_triton_inputs(a))
    return terms


def _triton_backward(b: BackwardArguments) -> Tensor:
    from fastdiff.triton_kernels import vlb_terms as kernels

    _refuse_float64(b.forward)
    gradient = _empty_gradient(b.forward)
    kernels.vlb_terms_backward(gradient, b.grad.float().contiguous(), *_triton_inputs(b.forward))
    return gradient


class _VlbTerms(torch.autograd.Function):
    """One pass forward, one backward, which recomputes every element: no results are saved."""

    @staticmethod
    def forward(ctx, op, backward, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            terms = op(*arguments)
        ctx.backward_op = backward
        ctx.save_for_backward(*arguments[:_NUM_TENSORS])
        ctx.constants = arguments[_NUM_TENSORS:]
        return terms

    @staticmethod
    def backward(ctx, grad):
        a = Arguments(*ctx.saved_tensors, *ctx.constants)
        if torch.is_grad_enabled():  # create_graph: a gradient that can be differentiated again
            (gradient,) = torch.autograd.grad(
                _reference(a), a.model_output, grad, create_graph=True, materialize_grads=True
            )
        else:
            gradient = ctx.backward_op(grad, *a)
        grads = dict.fromkeys(Arguments._fields)
        grads["model_output"] = gradient
        return None, None, *grads.values()


def _autograd(op: Callable, *arguments: object, backward: Callable | None = None) -> Tensor:
    a = Arguments(*arguments)
    if _needs_more_gradients(a.x0, a.x_t, a.table, a.noise):
        return _reference(a)
    if backward is None:
        backward = _backward_op.triton if op is _op.triton else _backward_op.default
    return _VlbTerms.apply(op, backward, *arguments)


_op = _library.define(
    "vlb_terms",
    f"({_SCHEMA}) -> Tensor",
    Arguments,
    fake=_fake,
    autograd=_autograd,
    reference=_reference,
    triton=_triton,
    check=_check,
)
_backward_op = _library.define(
    "vlb_terms_backward",
    f"(Tensor grad, {_SCHEMA}) -> Tensor",
    BackwardArguments.from_schema,
    fake=_fake_backward,
    autograd=None,
    reference=_reference_backward,
    triton=_triton_backward,
    check=_check_backward,
)
