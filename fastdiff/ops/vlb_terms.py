"""`vlb_terms`: one term of the variational bound per sample, with the errors of x0 and eps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff._backends import select_backend
from fastdiff.ops import _checks, _library
from fastdiff.ops._vlb_terms_checks import check as _check
from fastdiff.ops._vlb_terms_checks import check_backward as _check_backward
from fastdiff.reference.layout import memory_format_of
from fastdiff.reference.step_table import PREDICTIONS
from fastdiff.step_tables import LEARNED_VARIANCES, VARIANCES


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

    In bits per dimension (DDPM eqs. 5 and 13, SPEC §6), with the mean squared errors of the
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
        What `q_sample` made the noise from (an int, or int64 keys (B,)): it is made again in the
        kernel and never touches memory.
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
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise ValueError(
            f"vlb_terms: unknown prediction {prediction!r}; choose from {', '.join(PREDICTIONS)}"
        )
    if not isinstance(variance, str) or variance not in VARIANCES:
        raise ValueError(
            f"vlb_terms: unknown variance {variance!r}; choose from {', '.join(VARIANCES)}"
        )
    keys, integer = _checks.split_seed("vlb_terms", seed)
    stream = _checks.as_int64("vlb_terms", "stream", stream)
    arguments = (
        x0,
        x_t,
        model_output,
        t,
        table,
        noise,
        keys,
        integer,
        stream,
        PREDICTIONS.index(prediction),
        variance in LEARNED_VARIANCES,
        clip,
        detach_mean,
    )
    try:
        unsupported = _unsupported(x0, x_t, model_output, table, noise)
        backend = select_backend("vlb_terms", x_t, unsupported)
    except AttributeError:  # not a tensor
        _check(*arguments, check_range=False)
        raise
    if backend == "reference":
        _check(*arguments, check_range=True)
        return _reference(*arguments).unbind()
    found = _op.call(backend, arguments, (model_output,))
    return found.unbind() if isinstance(found, Tensor) else found


def _unsupported(
    x0: Tensor, x_t: Tensor, model_output: Tensor, table: Tensor, noise: Tensor | None
) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    if torch.float64 in (x0.dtype, x_t.dtype, model_output.dtype, table.dtype):
        return "there are no float64 kernels"
    if _library.in_functorch_transform():
        return "only the reference runs under torch.func's transforms"
    if torch.is_grad_enabled() and _needs_more_gradients(x0, x_t, table, noise):
        return "kernels differentiate in model_output alone"
    return None


def _needs_more_gradients(*inputs: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in inputs)


def _compute_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [x.dtype for x in inputs] else torch.float32


def _fake(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    *rest: object,
) -> Tensor:
    _checks.check_one_device(x_t, x0, model_output, t, table, noise, keys)
    return x_t.new_empty((3, x_t.shape[0]), dtype=_compute_dtype(x0, x_t, model_output))


def _reference(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    prediction: int,
    learned: bool,
    clip: bool,
    detach_mean: bool,
) -> Tensor:
    return torch.stack(
        reference.vlb_terms(
            x0,
            x_t,
            model_output,
            t,
            table,
            noise=noise,
            seed=keys if keys is not None else seed,
            stream=stream,
            prediction=PREDICTIONS[prediction],
            learned=learned,
            clip=clip,
            detach_mean=detach_mean,
        )
    )


def _dense(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    *rest: object,
) -> tuple:
    """The arguments as a Triton launcher takes them: dense, and whether they are channels_last."""
    memory_format = memory_format_of(x_t)

    def dense(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous(memory_format=memory_format)

    return (
        dense(x0),
        dense(x_t),
        dense(model_output),
        t.contiguous(),
        table.contiguous(),
        dense(noise),
        None if keys is None else keys.contiguous(),
        *rest,
        memory_format != torch.contiguous_format,
    )


def _triton(*arguments: object) -> Tensor:
    from fastdiff.triton_kernels import vlb_terms as kernels

    _library.refuse_float64("vlb_terms", *arguments[:3], arguments[4])
    out = _fake(*arguments)
    kernels.vlb_terms(out, *_dense(*arguments))
    return out


def _backward_fake(
    grad: Tensor,
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    *rest: object,
) -> Tensor:
    _checks.check_one_device(x_t, grad, x0, model_output, *rest[:4])
    return torch.empty(
        model_output.shape,
        dtype=model_output.dtype,
        device=model_output.device,
        memory_format=memory_format_of(x_t),
    )


def _backward_reference(
    grad: Tensor, x0: Tensor, x_t: Tensor, model_output: Tensor, *rest: object
) -> Tensor:
    out = _backward_fake(grad, x0, x_t, model_output, *rest)
    with _library.recording():
        output = model_output.detach().requires_grad_()
        terms = _reference(x0, x_t, output, *rest)
        if terms.requires_grad:  # not with detach_mean and a fixed variance
            out.copy_(torch.autograd.grad(terms, output, grad)[0])
        else:
            out.zero_()
    return out


def _backward_triton(grad: Tensor, *arguments: object) -> Tensor:
    from fastdiff.triton_kernels import vlb_terms as kernels

    _library.refuse_float64("vlb_terms", *arguments[:3], arguments[4])
    out = _backward_fake(grad, *arguments)
    kernels.vlb_terms_backward(out, grad.float().contiguous(), *_dense(*arguments))
    return out


class _VlbTerms(torch.autograd.Function):
    """One pass forward, one backward, which computes every element again: nothing is saved."""

    @staticmethod
    def forward(ctx, op, backward, x0, x_t, model_output, t, table, noise, keys, *rest):
        with torch._C._AutoDispatchBelowAutograd():
            out = op(x0, x_t, model_output, t, table, noise, keys, *rest)
        ctx.backward_op, ctx.rest = backward, rest
        ctx.save_for_backward(x0, x_t, model_output, t, table, noise, keys)
        return out

    @staticmethod
    def backward(ctx, grad):
        arguments = (*ctx.saved_tensors, *ctx.rest)
        model_output = arguments[2]
        if torch.is_grad_enabled():  # create_graph: a gradient that can be differentiated again
            terms = _reference(*arguments)
            (gradient,) = torch.autograd.grad(
                terms, model_output, grad, create_graph=True, materialize_grads=True
            )
        else:
            gradient = ctx.backward_op(grad, *arguments)
        return (None, None, None, None, gradient, *[None] * (len(arguments) - 3))


def _autograd(op, *args, backward=None):
    x0, x_t, _, _, table, noise, *_ = args
    if _needs_more_gradients(x0, x_t, table, noise):
        return _reference(*args)
    if backward is None:
        backward = _backward_op.triton if op is _op.triton else _backward_op.default
    return _VlbTerms.apply(op, backward, *args)


_ARGUMENTS = (
    "Tensor x0, Tensor x_t, Tensor model_output, Tensor t, Tensor table, Tensor? noise, "
    "Tensor? keys, SymInt? seed, SymInt stream, int prediction, bool learned, bool clip, "
    "bool detach_mean"
)
_op = _library.define(
    "vlb_terms",
    f"({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    autograd=_autograd,
    reference=_reference,
    triton=_triton,
    check=_check,
)
_backward_op = _library.define(
    "vlb_terms_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> Tensor",
    fake=_backward_fake,
    autograd=None,
    reference=_backward_reference,
    triton=_backward_triton,
    check=_check_backward,
)
