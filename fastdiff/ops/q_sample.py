"""`q_sample`: the closed-form forward process, with noise given or made in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff._backends import select_backend
from fastdiff.ops import _checks, _library
from fastdiff.reference.layout import memory_format_of


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
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (DDPM eq. 4, SPEC §3), in one pass.

    Coefficients and arithmetic are float32 whatever the dtype of the tensors; the result is rounded
    once. With `seed` the noise is made in the kernel (SPEC §9) and never touches memory:
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
    keys, integer = _checks.split_seed("q_sample", seed)
    stream = _checks.as_int64("q_sample", "stream", stream)
    arguments = (
        x0,
        t,
        sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar,
        noise,
        keys,
        integer,
        stream,
        flip,
        dtype,
    )
    try:
        backend = select_backend("q_sample", x0, _unsupported(*arguments))
    except AttributeError:  # not a tensor
        _check(*arguments, check_range=False)
        raise
    if backend == "reference":
        _check(*arguments, check_range=True)
        return reference.q_sample(
            x0,
            t,
            sqrt_alpha_bar,
            sqrt_one_minus_alpha_bar,
            noise,
            seed=seed,
            stream=stream,
            flip=flip,
            dtype=dtype,
        )
    return _op.call(backend, arguments, (x0, noise))


def _check(
    x0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    flip: Tensor | None,
    dtype: torch.dtype | None,
    *,
    check_range: bool,
) -> None:
    """Everything that can be wrong with the arguments, with the clear message."""
    op = "q_sample"
    _checks.check_exclusive(op, noise=noise, keys=keys, seed=seed)
    _checks.check_tensor(op, "x0", x0)
    if x0.dtype != torch.uint8:
        _checks.check_float(op, "x0", x0.dtype, "uint8 or a floating-point dtype")
    if dtype is not None:
        _checks.check_float(op, "dtype", dtype)
    if x0.dim() == 0:
        raise ValueError(f"{op}: x0 has shape (), expected (B, ...)")
    batch, device = x0.shape[0], x0.device
    num = _checks.check_tables(
        op,
        device,
        sqrt_alpha_bar=sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar=sqrt_one_minus_alpha_bar,
    )
    if noise is not None:
        _checks.check_like(op, "noise", noise, "x0", x0)
    if keys is not None:
        _checks.check_per_sample(op, "seed", keys, torch.int64, batch, device)
    if flip is not None:
        _checks.check_per_sample(op, "flip", flip, torch.bool, batch, device)
        if x0.dim() < 2:
            raise ValueError(f"{op}: flip needs x0 with a width, got shape {tuple(x0.shape)}")
    _checks.check_per_sample(op, "t", t, torch.int64, batch, device)
    if check_range:
        _checks.check_timestep_range(op, t, num)


def _unsupported(
    x0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    flip: Tensor | None,
    dtype: torch.dtype | None,
) -> str | None:
    """The one capability predicate of the kernels: why they cannot run this input, or None."""
    for table in (sqrt_alpha_bar, sqrt_one_minus_alpha_bar):
        if table.dtype == torch.float64:
            return "only the reference takes float64 tables"
        if table.requires_grad and torch.is_grad_enabled():
            return "only the reference differentiates the tables"
    if _library.in_functorch_transform():
        return "only the reference runs under torch.func's transforms"
    if x0.dtype == torch.float64 or dtype is torch.float64:
        if x0.device.type != "cpu" or noise is None:
            return "float64 kernels exist on the CPU only, and for given noise only"
        if x0.dtype == torch.uint8:
            return "only the reference takes uint8 to float64"
    return None


def _fake(
    x0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    flip: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    _checks.check_one_device(x0, t, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise, keys, flip)
    if dtype is None:
        dtype = torch.float32 if x0.dtype == torch.uint8 else x0.dtype
    return torch.empty(x0.shape, dtype=dtype, device=x0.device, memory_format=memory_format_of(x0))


def _reference(
    x0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    flip: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    out = reference.q_sample(
        x0,
        t,
        sqrt_alpha_bar,
        sqrt_one_minus_alpha_bar,
        noise,
        seed=keys if keys is not None else seed,
        stream=stream,
        flip=flip,
        dtype=dtype,
    )
    return out.contiguous(memory_format=memory_format_of(x0))


def _triton(
    x0: Tensor,
    t: Tensor,
    sqrt_alpha_bar: Tensor,
    sqrt_one_minus_alpha_bar: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    seed: int | None,
    stream: int,
    flip: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    from fastdiff.triton_kernels import q_sample as kernels

    _library.refuse_float64("q_sample", x0, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, dtype)
    out = _fake(
        x0, t, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, noise, keys, seed, stream, flip, dtype
    )
    memory_format = memory_format_of(x0)
    kernels.q_sample(
        out,
        x0.contiguous(memory_format=memory_format),
        t.contiguous(),
        sqrt_alpha_bar.contiguous(),
        sqrt_one_minus_alpha_bar.contiguous(),
        None if noise is None else noise.contiguous(memory_format=memory_format),
        None if keys is None else keys.contiguous(),
        seed,
        stream,
        None if flip is None else flip.contiguous(),
        memory_format != torch.contiguous_format,
    )
    return out


class _QSample(torch.autograd.Function):
    """Linear in x0 and noise: derivatives in both directions are the op itself."""

    @staticmethod
    def forward(op, x0, t, a, b, noise, keys, seed, stream, flip, dtype):
        with torch._C._AutoDispatchBelowAutograd():
            return op(x0, t, a, b, noise, keys, seed, stream, flip, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        op, x0, t, a, b, noise, *_, flip, _ = inputs
        ctx.op = op
        ctx.x0_dtype, ctx.out_dtype = x0.dtype, output.dtype
        ctx.noise_dtype = None if noise is None else noise.dtype
        ctx.save_for_backward(t, a, b, flip)
        ctx.save_for_forward(t, a, b, flip)

    @staticmethod
    def backward(ctx, grad):
        t, a, b, flip = ctx.saved_tensors
        wide = torch.float64 in (ctx.x0_dtype, ctx.out_dtype)

        def scaled(table: Tensor, other: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
            # Rounded once, to the operand's dtype; float64 is for arithmetic in float64 alone.
            narrow = torch.float32 if dtype == torch.float64 and not wide else dtype
            return ctx.op(grad, t, table, other, None, None, None, 0, flip, narrow).to(dtype)

        grad_x0 = grad_noise = None
        if ctx.needs_input_grad[1]:
            grad_x0 = scaled(a, b, flip, ctx.x0_dtype)
        if ctx.needs_input_grad[5]:
            grad_noise = scaled(b, a, None, ctx.noise_dtype)
        return None, grad_x0, None, None, None, grad_noise, None, None, None, None, None

    @staticmethod
    def jvp(ctx, _op, x0, _t, _a, _b, noise, *_):
        t, a, b, flip = ctx.saved_tensors
        if x0 is None:
            return ctx.op(noise, t, b, a, None, None, None, 0, None, ctx.out_dtype)
        return ctx.op(x0, t, a, b, noise, None, None, 0, flip, ctx.out_dtype)


def _autograd(op, *args):
    return _QSample.apply(op, *args)


_op = _library.define(
    "q_sample",
    "(Tensor x0, Tensor t, Tensor sqrt_alpha_bar, Tensor sqrt_one_minus_alpha_bar, Tensor? noise, "
    "Tensor? keys, SymInt? seed, SymInt stream, Tensor? flip, ScalarType? dtype) -> Tensor",
    fake=_fake,
    autograd=_autograd,
    reference=_reference,
    triton=_triton,
    check=_check,
)
