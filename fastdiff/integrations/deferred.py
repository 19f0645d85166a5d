"""Values that a forward computes later, together with what follows them.

`rewriting` puts these functions where a network's forward normalizes, adds, scales and activates.
Each does what stood there, unless it meets a normalization of a patched network or a `Deferred`:

    h = h + t;  h = norm(h);  h = h * (1 + s) + u;  h = silu(h)

then is one `ops.group_norm_silu`, run by the last step. What fuses is decided on the objects that
are there: shapes, dtypes, classes, hooks. A Deferred never leaves the function that made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.integrations.recognition import (
    is_group_norm,
    is_plain,
    is_sigmoid,
    is_silu,
    is_watched,
)
from fastdiff.ops import group_norm_silu


class Norm(NamedTuple):
    """A normalization, with its parameters at the time of its call."""

    module: nn.Module
    """The normalization, or the owner of a method that calls F.group_norm."""
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Deferred:
    """norm(x + channel_bias) * (1 + scale) + shift, or x + channel_bias, not yet computed.

    The last three are (B, C, 1, ...) or None. Shape and dtype of the value are those of x.
    """

    __slots__ = ("channel_bias", "norm", "scale", "shift", "value", "x")

    def __init__(
        self,
        x: Tensor,
        channel_bias: Tensor | None,
        norm: Norm | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        self.x, self.channel_bias, self.norm = x, channel_bias, norm
        self.scale, self.shift, self.value = scale, shift, None

    def result(self) -> Tensor:
        if self.value is None:
            if self.norm is None:
                self.value = self.x + self.channel_bias
            else:
                self.value = self.fused("identity")
        return self.value

    def fused(self, activation: str) -> Tensor:
        return normalized(self.x, self.norm, activation, self.channel_bias, self.scale, self.shift)


class Unassigned(Deferred):
    """What a variable holds before its first assignment."""

    __slots__ = ()

    def result(self) -> Tensor:
        raise UnboundLocalError("a variable of a patched forward is read before it is assigned")


UNASSIGNED = Unassigned(None, None)


def normalized(
    x: Tensor,
    norm: Norm,
    activation: str = "identity",
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The op; small operands are (B, C, 1, ...), or (1, C, 1, ...) for the whole batch."""
    module, num_groups, weight, bias, eps = norm
    compiling = torch.compiler.is_compiling()
    if not compiling and "_fastdiff_ran" not in module.__dict__:
        _note(module, x, activation, channel_bias, scale, shift)
    if channel_bias is not None:
        channel_bias = _per_sample(channel_bias, x)
    if scale is not None:
        scale = _per_sample(scale, x)
    if shift is not None:
        shift = _per_sample(shift, x)
    # In attention, a view (B, C, N) of (B, N, C): channels_last without a copy. A graph is not
    # asked for strides: under checkpointing Dynamo cannot answer.
    tokens = not compiling and x.dim() == 3 and _channels_are_innermost(x)
    if tokens:
        x = x.unsqueeze(3)
    y = group_norm_silu(x, num_groups, weight, bias, eps, channel_bias, scale, shift, activation)
    return y.squeeze(3) if tokens else y


def _note(module, x, activation, channel_bias, scale, shift) -> None:
    """For the report: what the module's op does when it first runs."""
    if type(x) is not Tensor:  # a tracer's: its sizes may be symbols
        return
    there = {
        "channel_bias": channel_bias is not None,
        "scale_shift": scale is not None or shift is not None,
        "silu": activation == "silu",
    }
    module.__dict__["_fastdiff_ran"] = (frozenset(s for s in there if there[s]), x.shape, x.dtype)


def _channels_are_innermost(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def _per_sample(operand: Tensor, x: Tensor) -> Tensor:
    operand = operand.flatten(1)
    return operand if operand.shape[0] == x.shape[0] else operand.expand(x.shape[0], -1)


def _is_per_channel(operand: Any, x: Any) -> bool:
    """Whether operand is (B, C, 1, ...) or (1, C, 1, ...) to an image x of its dtype."""
    if not is_plain(type(operand)) or not is_plain(type(x)):
        return False
    shape, image = operand.shape, x.shape
    if len(shape) != len(image) or len(shape) < 3 or shape[-1] != 1 or shape[1] != image[1]:
        return False
    if shape[0] != image[0] and shape[0] != 1:
        return False
    return operand.dtype == x.dtype and operand.is_floating_point() and shape[2:].numel() == 1


def now(v: Any) -> Any:
    """The value of a variable that may hold a Deferred."""
    return v.result() if isinstance(v, Deferred) else v


def settle(v: Any) -> Any:
    """`now`, for a variable that may not be assigned yet."""
    return v if v is UNASSIGNED else now(v)


def like(v: Any) -> Any:
    """A tensor of the shape, dtype and device of v."""
    return v.x if isinstance(v, Deferred) and v is not UNASSIGNED else now(v)


def call(f: Callable, v: Any) -> Any:
    """f(v), deferred if f is a normalization, fused if f is SiLU behind one."""
    x, channel_bias = v, None
    if isinstance(v, Deferred):
        if runs_in_order(f):
            return sequential(f, v)
        if v.norm is not None:
            if is_silu(f):
                return _activated(v, getattr(f, "inplace", False))
            x = v.result()
        elif v.value is None and v is not UNASSIGNED:
            x, channel_bias = v.x, v.channel_bias
        else:
            x = v.result()
    parameters_for = getattr(type(f), "_fastdiff_parameters", None)
    if parameters_for is not None and not is_watched(f):
        norm = parameters_for(f, x)
        if norm is not None:
            return Deferred(x, channel_bias, norm)
    return f(x if channel_bias is None else v.result())


def apply(f: Callable, v: Any, **inplace: bool) -> Any:
    """f(v), a value; `inplace` as F.silu takes it."""
    if inplace:
        if isinstance(v, Deferred) and v.norm is not None and is_silu(f):
            return _activated(v, inplace["inplace"])
        return f(now(v), **inplace)
    return now(call(f, v))


def _activated(v: Deferred, in_place: bool) -> Tensor:
    if v.value is not None:  # somebody has it: as it was written
        return nn.functional.silu(v.value, in_place)
    y = v.fused("silu")
    if in_place:
        v.value = y
    return y


def runs_in_order(f: Any) -> bool:
    """Whether f is a Sequential that only calls its children, and nobody watches."""
    if not isinstance(f, nn.Sequential):
        return False
    cls = getattr(type(f), "_fastdiff_original", None) or type(f)
    return (cls.forward, cls.__iter__) == _in_order and not is_watched(f)


_in_order = nn.Sequential.forward, nn.Sequential.__iter__


def sequential(f: nn.Sequential, v: Any) -> Any:
    for child in f._modules.values():
        v = call(child, v)
    return now(v)


def group_norm(owner: Any, f: Callable, x: Any, *args: Any, **kwargs: Any) -> Any:
    """f(x, *args, **kwargs), deferred if f is torch's functional group_norm; called in `owner`."""
    if not is_group_norm(f):
        return f(now(x), *args, **kwargs)
    channel_bias = None
    if isinstance(x, Deferred) and x.norm is None and x.value is None and x is not UNASSIGNED:
        x, channel_bias, whole = x.x, x.channel_bias, x
    else:
        x = whole = now(x)
    norm = _functional(owner, *args, **kwargs)
    if not is_image(x) or not all(t is None or is_plain(type(t)) for t in norm[2:4]):
        return f(now(whole), *args, **kwargs)
    return Deferred(x, channel_bias, norm)


def _functional(owner, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True) -> Norm:
    return Norm(owner, num_groups, weight, bias, eps)


def is_image(x: Any) -> bool:
    """Whether the op takes x; torch's group_norm takes more: (N, C), quantized numbers, DTensor
    and other subclasses with rules of their own. A tracer's proxy is not a tensor."""
    return is_plain(type(x)) and 3 <= x.dim() <= 5 and x.is_floating_point()


def add(a: Any, b: Any) -> Any:
    """a + b: behind a normalization a shift."""
    for image, shift in ((a, b), (b, a)):
        if _is_open(image) and image.shift is None and _is_per_channel(shift, image.x):
            return Deferred(image.x, image.channel_bias, image.norm, image.scale, shift)
    return now(a) + now(b)


def _is_open(v: Any) -> bool:
    """Whether v is a normalization that nobody needed yet."""
    return isinstance(v, Deferred) and v.norm is not None and v.value is None


def early(a: Any, b: Any) -> Any:
    """a + b that a normalization reads."""
    if not isinstance(a, Deferred) and not isinstance(b, Deferred):
        if _is_per_channel(b, a):
            return Deferred(a, b)
        if _is_per_channel(a, b):
            return Deferred(b, a)
        return a + b
    return add(a, b)


def add_in_place(a: Any, b: Any, maker: Any, method: bool) -> Any:
    """a += b, or a.add_(b), that a normalization reads, where a came from maker(...) and nobody
    else has it."""
    if makes_new_tensors(maker) and _is_per_channel(b, a) and a.shape[0] >= b.shape[0]:
        return Deferred(a, b)
    a = now(a)
    if method:
        return a.add_(b)
    a += b
    return a


def makes_new_tensors(f: Any) -> bool:
    """Whether f returns what a convolution made; it may be somebody's own, such as EDM's."""
    if not isinstance(f, nn.Module) or is_watched(f):
        return False
    if type(f).forward in _convolutions:
        return True
    names = getattr(getattr(type(f).forward, "__code__", None), "co_names", ())
    is_named = "conv" in type(f).__name__.lower() and not {"conv2d", "conv3d"}.isdisjoint(names)
    return is_named and not f._modules and isinstance(getattr(f, "weight", None), Tensor)


_convolutions = {
    cls.forward
    for cls in (
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.Linear,
    )
}  # fmt: skip


def scaled(a: Any, scale: Any) -> Any:
    """a * (1 + scale)."""
    if _takes_scale(a, scale):
        return Deferred(a.x, a.channel_bias, a.norm, scale)
    return now(a) * (1 + scale)


def scaled_sum(a: Any, scale: Any) -> Any:
    """a + a * scale."""
    if _takes_scale(a, scale):
        return Deferred(a.x, a.channel_bias, a.norm, scale)
    a = now(a)
    return a + a * scale


def addcmul(f: Callable, shift: Any, a: Any, scale: Any) -> Any:
    """f(shift, a, 1 + scale), f being torch.addcmul."""
    if f is torch.addcmul and _takes_scale(a, scale) and _is_per_channel(shift, a.x):
        return Deferred(a.x, a.channel_bias, a.norm, scale, shift)
    return f(now(shift), now(a), 1 + scale)


def _takes_scale(a: Any, scale: Any) -> bool:
    return _is_open(a) and a.scale is None and a.shift is None and _is_per_channel(scale, a.x)


def cast(v: Any, method: str, *dtype: Any) -> Any:
    """v.float(), v.type(dtype) or v.to(dtype): nothing, if that is v's dtype."""
    if isinstance(v, Deferred) and v is not UNASSIGNED:
        target = torch.float32 if method == "float" else dtype and dtype[0]
        if target is v.x.dtype:
            return v
    return getattr(now(v), method)(*dtype)


def swish(v: Any, sigmoid: Callable) -> Any:
    """v * sigmoid(v)."""
    if _is_open(v) and is_sigmoid(sigmoid):
        return v.fused("silu")
    v = now(v)
    return v * sigmoid(v)
