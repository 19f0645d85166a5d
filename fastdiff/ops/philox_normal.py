"""`philox_normal`: the standard normals that other ops generate in their kernels, as a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff._backends import select_backend
from fastdiff.ops import _library
from fastdiff.reference import checks
from fastdiff.reference.layout import memory_format_of

_CHANNELS_LAST_DIMS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def philox_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """n[k, e] ~ N(0, 1), a pure function of (seed, k, e, stream): Math §9.

    Sample k has the 64-bit key number k + 1 of SplitMix64(seed); element e of the sample, counted
    in logical (C, H, W) order whatever the memory format, is made from word e mod 4 of the
    Philox4x32-10 block with counter (e div 4, stream) by Box-Muller in float32. The words are
    identical on every backend, the normals agree to a few float32 ulps; half precisions are the
    float32 normals rounded once.

    Parameters
    ----------
    shape
        (B, ...): the first dimension counts samples.
    seed
        An int (any size; its low 64 bits count) or the int64 keys (B,) themselves
        (`fastdiff.ops.sample_keys`).
    stream
        Separates uses of one seed: the training step, the sampler's step number.
    dtype
        float32, bfloat16, float16 or float64 (float64 arithmetic on the reference backend only).
    memory_format
        torch.contiguous_format, channels_last (4-D) or channels_last_3d (5-D).

    Returns
    -------
    Tensor
        `shape`, `dtype`, on `device`. No gradient.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what was expected.

    Examples
    --------
    >>> import fastdiff
    >>> a = fastdiff.ops.philox_normal((8, 3, 32, 32), seed=0)
    >>> b = fastdiff.ops.philox_normal((2, 3, 32, 32), seed=0)  # the first two samples of `a`
    >>> bool((a[:2] == b).all())
    True
    """
    op = "philox_normal"
    if isinstance(shape, (int, str)) or not hasattr(shape, "__iter__"):
        raise TypeError(f"{op}: shape is {checks.shown(shape)}, expected a sequence of ints")
    shape = tuple(shape)
    for size in shape:
        # Larger ones would be reduced to 64 bits, as seeds are.
        if checks.as_int64(op, "shape", size) != size or size < 0:
            raise ValueError(
                f"{op}: shape is {checks.shown(shape)}, expected sizes from 0 to 2**63 - 1"
            )
    if not shape:
        raise ValueError(f"{op}: shape is (), expected (B, ...)")
    checks.check_float(op, "dtype", dtype)
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"{op}: memory_format is {memory_format!r}, expected a torch.memory_format")
    dims = _CHANNELS_LAST_DIMS.get(memory_format)
    if dims is None and memory_format != torch.contiguous_format:
        raise ValueError(
            f"{op}: memory_format is {memory_format}, expected torch.contiguous_format, "
            "torch.channels_last or torch.channels_last_3d"
        )
    if dims is not None and len(shape) != dims:
        raise ValueError(f"{op}: {memory_format} needs {dims} dimensions, shape is {shape}")
    out = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    if seed is None:
        raise TypeError(f"{op}: seed is None, expected an int or int64 keys (B,)")
    keys, integer = checks.split_seed(op, seed)
    if keys is not None:
        checks.check_per_sample(op, "seed", keys, torch.int64, shape[0], out.device)
    stream = checks.as_int64(op, "stream", stream)
    unsupported = None
    if dtype == torch.float64:
        unsupported = "float64 runs on the reference backend only"
    elif keys is not None or torch.jit.is_tracing():
        unsupported = _library.why_reference(out if keys is None else keys, has_jvp=True)
    backend = select_backend(op, out, unsupported)
    if backend == "reference":
        return reference.philox_normal(
            shape,
            seed,
            stream=stream,
            dtype=dtype,
            device=out.device,
            memory_format=memory_format,
        )
    (_op.triton if backend == "triton" else _op.default)(out, keys, integer, stream)
    return out


class Arguments(NamedTuple):
    """The raw operator's arguments, in the order of its schema."""

    out: Tensor
    keys: Tensor | None
    seed: int | None
    stream: int


def _fake(a: Arguments) -> None:
    return None


def _reference(a: Arguments) -> None:
    normals = reference.philox_normal(
        a.out.shape,
        _library.joined_seed(a),
        stream=a.stream,
        dtype=a.out.dtype,
        device=a.out.device,
    )
    a.out.copy_(normals)


def _triton(a: Arguments) -> None:
    from fastdiff.triton_kernels import philox_normal as kernels

    op = "philox_normal"
    checks.check_float(op, "out", a.out.dtype)
    if (a.keys is None) == (a.seed is None):
        raise ValueError(f"{op}: pass either keys or seed")
    memory_format = memory_format_of(a.out)
    if not a.out.is_contiguous(memory_format=memory_format):
        raise ValueError(
            f"{op}: out has strides {a.out.stride()}, expected a contiguous or channels_last tensor"
        )
    if a.keys is not None:
        checks.check_per_sample(op, "keys", a.keys, torch.int64, a.out.shape[0], a.out.device)
    kernels.philox_normal(
        a.out,
        _library.contiguous(a.keys),
        a.seed,
        a.stream,
        memory_format != torch.contiguous_format,
    )


_op = _library.define(
    "philox_normal_",
    "(Tensor(a!) out, Tensor? keys, SymInt? seed, SymInt stream) -> ()",
    Arguments,
    fake=_fake,
    autograd=None,
    reference=_reference,
    triton=_triton,
)
