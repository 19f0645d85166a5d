"""`q_sample`: the closed-form forward process, with noise given or made in the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff._backends import select_backend
from fastdiff.ops import _library
from fastdiff.reference import checks
from fastdiff.reference.layout import memory_format_of


class Arguments(NamedTuple):
    """The raw operator's arguments, in the order of its schema."""

    x0: Tensor
    t: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    noise: Tensor | None
    keys: Tensor | None
    seed: int | None
    stream: int
    flip: Tensor | None
    dtype: torch.dtype | None


_SCHEMA = (
    "(Tensor x0, Tensor t, Tensor sqrt_alpha_bar, Tensor sqrt_one_minus_alpha_bar, Tensor? noise, "
    "Tensor? keys, SymInt? seed, SymInt stream, Tensor? flip, ScalarType? dtype) -> Tensor"
)


def q_sample(
    x0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    flip: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (DDPM eq. 4, Math §3), in one pass.

    Coefficients and arithmetic are float32 whatever the dtype of the tensors; the result is rounded
    once. With `seed` the noise is made in the kernel (Math §9) and never touches memory:
    `philox_normal(x0.shape, seed, stream=stream)` is the same noise.

    Parameters
    ----------
    x0
        (B, ...), floating point with pixels in [-1, 1], or uint8 levels 0..255, which are scaled to
        (2 x0 - 255) / 255 in the kernel. Contiguous or channels_last; other strides work through a
        copy.
    t
        (B,) int64, 0-based timesteps.
    sqrt_alpha_bar, sqrt_one_minus_alpha_bar
        (T,) float32 tables (float64 ones, and ones that require grad, run on the reference).
    noise
        Same shape as x0, floating point. Exclusive with `seed`; one of them is needed.
    seed
        An int, or int64 keys (B,).
    stream
        Separates uses of one seed.
    flip
        (B,) bool: mirror these samples of x0 along their last dimension (the noise stays).
    dtype
        Of the result; default: that of x0, float32 for uint8.

    Returns
    -------
    Tensor
        x_t, shape and memory format of x0. Differentiable in x0, noise and (on the reference)
        the tables, any number of times. Under autocast nothing is cast: the result keeps its dtype.

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
    >>> tables = schedule.sqrt_alpha_bars.float(), schedule.sqrt_one_minus_alpha_bars.float()
    >>> x0 = torch.rand(4, 3, 32, 32) * 2 - 1
    >>> t = torch.randint(1000, (4,))
    >>> x_t = fastdiff.ops.q_sample(x0, t, *tables, seed=0)
    """
    if (noise is None) == (seed is None):
        given = "neither" if noise is None else "both"
        raise ValueError(f"q_sample: pass either noise or seed; {given} was given")
    keys, integer = checks.split_seed("q_sample", seed)
    arguments = (
        x0,
        t,
        sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar,
        noise,
        keys,
        integer,
        checks.as_int64("q_sample", "stream", stream),
        flip,
        dtype,
    )
    try:
        unsupported = _unsupported(x0, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise, dtype)
        backend = select_backend("q_sample", x0, unsupported)
    except AttributeError:  # not a tensor
        _check(Arguments(*arguments), check_range=False)
        raise
    return _op.call(backend, arguments, (x0, noise))


def _unsupported(
    x0: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None,
    dtype: torch.dtype | None,
) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    for table in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar):
        if table.dtype == torch.float64:
            return "only the reference takes float64 tables"
        if table.requires_grad and torch.is_grad_enabled():
            return "only the reference differentiates the tables"
    if (reason := _library.why_reference(x0, has_jvp=True)) is not None:
        return reason
    if x0.dtype == torch.float64 or dtype is torch.float64:
        if x0.device.type != "cpu" or noise is None:
            return "float64 kernels exist on the CPU only, and for given noise only"
        if x0.dtype == torch.uint8:
            return "only the reference takes uint8 to float64"
    return None


def _check(a: Arguments, *, check_range: bool) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    op = "q_sample"
    checks.check_noise_source(op, a.noise, a.keys, a.seed, required=False)
    checks.check_tensor(op, "x0", a.x0)
    if a.x0.dtype != torch.uint8:
        checks.check_float(op, "x0", a.x0.dtype, "uint8 or a floating-point dtype")
    if a.dtype is not None:
        checks.check_float(op, "dtype", a.dtype)
    if a.x0.dim() == 0:
        raise ValueError(f"{op}: x0 has shape (), expected (B, ...)")
    batch, device = a.x0.shape[0], a.x0.device
    num = checks.check_tables(
        op,
        device,
        sqrt_alpha_bar=a.sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar=a.sqrt_one_minus_alpha_bar,
    )
    if a.noise is not None:
        checks.check_like(op, "noise", a.noise, "x0", a.x0)
    if a.keys is not None:
        checks.check_per_sample(op, "seed", a.keys, torch.int64, batch, device)
    if a.flip is not None:
        checks.check_per_sample(op, "flip", a.flip, torch.bool, batch, device)
        if a.x0.dim() < 2:
            raise ValueError(
                f"{op}: x0 has shape {tuple(a.x0.shape)}, expected (B, ..., W) to flip along W"
            )
    checks.check_per_sample(op, "t", a.t, torch.int64, batch, device)
    if check_range:
        checks.check_timestep_range(op, a.t, num)


def _empty_result(a: Arguments) -> Tensor:
    dtype = a.dtype
    if dtype is None:
        dtype = torch.float32 if a.x0.dtype == torch.uint8 else a.x0.dtype
    return torch.empty(
        a.x0.shape, dtype=dtype, device=a.x0.device, memory_format=memory_format_of(a.x0)
    )


def _fake(a: Arguments) -> Tensor:
    checks.check_one_device(*a)
    return _empty_result(a)


def _reference(a: Arguments) -> Tensor:
    x_t = reference.q_sample(
        a.x0,
        a.t,
        a.sqrt_alpha_bar,
        a.sqrt_one_minus_alpha_bar,
        a.noise,
        seed=_library.joined_seed(a),
        stream=a.stream,
        flip=a.flip,
        dtype=a.dtype,
    )
    return x_t.contiguous(memory_format=memory_format_of(a.x0))


def _triton(a: Arguments) -> Tensor:
    from fastdiff.triton_kernels import q_sample as kernels

    _library.refuse_float64("q_sample", a.x0, a.sqrt_alpha_bar, a.sqrt_one_minus_alpha_bar, a.dtype)
    out = _empty_result(a)
    memory_format = memory_format_of(a.x0)
    kernels.q_sample(
        out,
        a.x0.contiguous(memory_format=memory_format),
        a.t.contiguous(),
        a.sqrt_alpha_bar.contiguous(),
        a.sqrt_one_minus_alpha_bar.contiguous(),
        None if a.noise is None else a.noise.contiguous(memory_format=memory_format),
        _library.contiguous(a.keys),
        a.seed,
        a.stream,
        _library.contiguous(a.flip),
        memory_format != torch.contiguous_format,
    )
    return out


class _QSample(torch.autograd.Function):
    """Linear in x0 and noise: derivatives in both directions are the op itself."""

    @staticmethod
    def forward(ctx, op, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            x_t = op(*arguments)
        a = Arguments(*arguments)
        ctx.op = op
        ctx.x0_dtype, ctx.out_dtype = a.x0.dtype, x_t.dtype
        ctx.noise_dtype = None if a.noise is None else a.noise.dtype
        constants = a.t, a.sqrt_alpha_bar, a.sqrt_one_minus_alpha_bar, a.flip
        ctx.save_for_backward(*constants)
        ctx.save_for_forward(*constants)
        return x_t

    @staticmethod
    def backward(ctx, grad):
        t, signal, sigma, flip = ctx.saved_tensors
        needed = Arguments(*ctx.needs_input_grad[1:])
        wide = torch.float64 in (ctx.x0_dtype, ctx.out_dtype)

        def scaled(table: Tensor, other: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
            # Rounded once, to the operand's dtype; float64 is for arithmetic in float64 alone.
            narrow = torch.float32 if dtype == torch.float64 and not wide else dtype
            return ctx.op(grad, t, table, other, None, None, None, 0, flip, narrow).to(dtype)

        grads = dict.fromkeys(Arguments._fields)
        if needed.x0:
            grads["x0"] = scaled(signal, sigma, flip, ctx.x0_dtype)
        if needed.noise:
            grads["noise"] = scaled(sigma, signal, None, ctx.noise_dtype)
        return None, *grads.values()

    @staticmethod
    def jvp(ctx, _op, *tangents):
        t, signal, sigma, flip = ctx.saved_tensors
        tangent = Arguments(*tangents)
        if tangent.x0 is None:
            return ctx.op(tangent.noise, t, sigma, signal, None, None, None, 0, None, ctx.out_dtype)
        return ctx.op(
            tangent.x0, t, signal, sigma, tangent.noise, None, None, 0, flip, ctx.out_dtype
        )


_op = _library.define(
    "q_sample",
    _SCHEMA,
    Arguments,
    fake=_fake,
    autograd=_QSample.apply,
    reference=_reference,
    triton=_triton,
    check=_check,
)
