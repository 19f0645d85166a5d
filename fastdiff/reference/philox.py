"""Counter-based random words and per-sample keys (Math §9), in plain PyTorch.

Philox4x32-10 is from Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3";
SplitMix64 from Steele, Lea & Flood 2014.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff._device_cache import is_plain_eager

_MASK32 = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def to_int64(value: int) -> int:
    """The signed 64-bit integer with the same low 64 bits as `value`."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of the 64 bits of an int64 tensor."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample_keys(
    seed: int, num: int, offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """64-bit keys of samples `offset` .. `offset + num - 1` of a call with integer `seed`.

    Key k is output number k + 1 of SplitMix64 started at `seed` (Math §9), so a sample keeps its
    noise when the batch is split or spread over devices.

    Returns
    -------
    Tensor
        int64, shape (num,): the unsigned keys' bit patterns.

    Examples
    --------
    >>> import torch, fastdiff
    >>> keys = fastdiff.ops.sample_keys(0, 8)
    >>> torch.equal(keys[5:], fastdiff.ops.sample_keys(0, 3, offset=5))
    True
    """
    seed = to_int64(seed) if isinstance(seed, int) else seed
    if torch.compiler.is_compiling():
        device = torch.empty(0, device=device).device
        return _opaque_sample_keys(seed, num, offset, device)
    for name, value in (("num", num), ("offset", offset)):
        if not hasattr(value, "__index__"):
            raise TypeError(f"sample_keys: {name} is {value!r}, expected an int")
        if not 0 <= value < 1 << 62:
            raise ValueError(f"sample_keys: {name} is negative or 2**62 or more")
    if device is not None and torch.device(device).type == "cuda" and is_plain_eager():
        # One copy instead of a dozen kernels.
        return sample_keys(seed, num, offset, "cpu").pin_memory().to(device, non_blocking=True)
    k = torch.arange(offset, offset + num, dtype=torch.int64, device=device)
    return derived_keys(seed, k)


# Under torch.compile these are opaque ops: of their wrapping 64-bit products Inductor (torch 2.14,
# C++ back end) makes wrong words, after minutes of compiling.
@torch.library.custom_op("fastdiff::reference_sample_keys", mutates_args=())
def _opaque_sample_keys(seed: int, num: int, offset: int, device: torch.device) -> Tensor:
    return sample_keys(seed, num, offset, device)


@_opaque_sample_keys.register_fake
def _(seed: int, num: int, offset: int, device: torch.device) -> Tensor:
    return torch.empty(num, dtype=torch.int64, device=device)


def derived_keys(key: int | Tensor, k: Tensor) -> Tensor:
    """Output number k + 1 of SplitMix64 started at `key`, int64 (Math §9).

    With the key of a sample: one key for each of its timesteps k.
    """
    z = key + (k + 1) * to_int64(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * to_int64(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * to_int64(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Parameters
    ----------
    counter, key
        Four and two int64 tensors (broadcastable) holding unsigned 32-bit words.

    Returns
    -------
    tuple of Tensor
        Four int64 tensors holding unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap to negative int64; shifting and masking recovers their halves.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def sample_words(keys: Tensor, numel: int, stream: int = 0, first: int = 0) -> Tensor:
    """The words of `numel` elements of every sample from element `first` (a multiple of 4) on.

    Elements are counted in logical (C, H, W) order.

    Element e takes word e mod 4 of the block with counter
    (lo(e div 4), hi(e div 4), lo(stream), hi(stream)) and key (lo(key), hi(key)) (Math §9).

    Returns
    -------
    Tensor
        int64, shape (B, numel), values in [0, 2**32).
    """
    stream = to_int64(stream) if isinstance(stream, int) else stream
    if torch.compiler.is_compiling():
        return _opaque_sample_words(keys, numel, stream, first)
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=keys.device) + first // 4
    zero = torch.zeros_like(block)
    counter = (
        block & _MASK32,
        (block >> 32) & _MASK32,
        zero + (stream & _MASK32),
        zero + ((stream >> 32) & _MASK32),
    )
    key = ((keys & _MASK32)[:, None], ((keys >> 32) & _MASK32)[:, None])
    words = torch.stack(philox4x32(counter, key), dim=-1)
    return words.flatten(1)[:, :numel]


@torch.library.custom_op("fastdiff::reference_sample_words", mutates_args=())
def _opaque_sample_words(keys: Tensor, numel: int, stream: int, first: int) -> Tensor:
    return sample_words(keys, numel, stream, first).contiguous()


@_opaque_sample_words.register_fake
def _(keys: Tensor, numel: int, stream: int, first: int) -> Tensor:
    return keys.new_empty((keys.shape[0], numel))
