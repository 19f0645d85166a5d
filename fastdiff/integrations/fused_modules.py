"""What `patch` turns modules into: same object, attributes and state dict, another class.

A module gets a subclass of its own class with the same name, so `isinstance`, hooks, `deepcopy`,
`.to()`, wrappers and checkpoints go on as before, and giving the class back undoes it. Only the
owner of a normalization and an activation fuses the two, inside its own methods: each of them, if
anybody else calls it, computes what it did before. Every fused method first looks whether someone
watches the modules it would skip (hooks, a forward set on the instance, another module in their
place), and then runs the original code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from fastdiff.integrations.pair_calls import Pairs, methods_of, pairs_in, rewritten
from fastdiff.ops import group_norm_silu

_group_norm_forward = nn.GroupNorm.forward
SILU_CLASSES: dict[type, Callable] = {nn.SiLU: nn.SiLU.forward}
"""Classes whose forward is x sigmoid(x), with it; `patch` adds look-alikes that it has tried."""


class Fused:
    """Base of the mixins. Their methods return NotImplemented where the original has to run."""

    # Of a class that `fused_class` made: its arguments. Names that no network uses.
    _fastdiff_mixin = _fastdiff_original = _fastdiff_pairs = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Ends here: projects that register their subclasses by name shall not see ours."""

    def __reduce_ex__(self, protocol: int):
        original = self._fastdiff_original
        if original.__reduce_ex__ is not object.__reduce_ex__:
            return super().__reduce_ex__(protocol)
        if original.__reduce__ is not object.__reduce__:
            return super().__reduce_ex__(protocol)
        # The class is made at run time, so a pickle names what it is made of.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self._fastdiff_mixin, self._fastdiff_original, self._fastdiff_pairs), *state

    @classmethod
    def _fastdiff_methods(cls, original: type, pairs: Pairs) -> dict[str, Callable]:
        """What runs in place of methods of `original`, by name."""
        return {name: vars(cls)[name] for name in ("forward", "_forward") if name in vars(cls)}


_classes: dict[tuple, type] = {}


def fused_class(mixin: type, original: type, pairs: Pairs = frozenset()) -> type:
    """The subclass of `original` whose methods are the mixin's where these apply.

    It is `original` by name: wrappers, device maps, configurations and tracers look for names.
    """
    key = mixin, original, pairs
    if key not in _classes or not _is_current(_classes[key]):
        _classes[key] = _make_class(*key)
    return _classes[key]


def _is_current(cls: type) -> bool:
    """Whether the methods that it replaces are still those of the original."""
    return all(
        getattr(cls._fastdiff_original, name) is f for name, f in cls._fastdiff_replaced.items()
    )


def _make_class(mixin: type, original: type, pairs: Pairs) -> type:
    methods = {
        name: _guarded(original, name, function)
        for name, function in mixin._fastdiff_methods(original, pairs).items()
    }
    attributes = {
        **{k: getattr(original, k) for k in ("__module__", "__qualname__", "__doc__")},
        "__annotations__": dict(getattr(original, "__annotations__", {})),  # TorchScript reads them
        "_fastdiff_mixin": mixin,
        "_fastdiff_original": original,
        "_fastdiff_pairs": pairs,
        "_fastdiff_replaced": {name: getattr(original, name) for name in methods},
    }
    return type(original.__name__, (mixin, original), attributes | methods)


def _guarded(original: type, name: str, fused: Callable) -> Callable:
    """The method of a fused class: `fused`, unless the original has to run.

    That is so if `original` got another method since (some projects replace a class's forward),
    in torch.jit.trace, on which ONNX export may stand, and for a bound method that was kept while
    its module was unpatched.
    """
    seen, is_tracing, base = getattr(original, name), torch.jit.is_tracing, Fused

    def method(self, *args, **kwargs):
        current = getattr(original, name)
        if current is seen and not is_tracing() and isinstance(self, base):
            result = fused(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return current(self, *args, **kwargs)

    # With the original's globals, torch.jit.script, which reads the source behind __wrapped__,
    # compiles the original.
    innermost = inspect.unwrap(seen)
    method = FunctionType(method.__code__, innermost.__globals__, name, None, method.__closure__)
    return functools.update_wrapper(method, seen)


def _new(mixin: type, original: type, pairs: Pairs = frozenset()) -> nn.Module:
    cls = fused_class(mixin, original, pairs)
    return cls.__new__(cls)


def is_watched(*modules: nn.Module) -> bool:
    """Whether a call of one of the modules does more than run its class's forward."""
    if (
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    ):
        return True
    for m in modules:  # a loop: this runs in every call, and a generator costs as much again
        if (
            m._forward_hooks
            or m._forward_pre_hooks
            or m._backward_hooks
            or m._backward_pre_hooks
            or "forward" in m.__dict__
        ):
            return True
    return False


def is_pair(norm: object, activation: object) -> bool:
    """Whether these two, one after the other, may run as one op."""
    cls = type(activation)
    known = SILU_CLASSES.get(cls)
    return (
        known is not None
        and known is cls.forward
        and isinstance(norm, FusedGroupNorm)
        and norm._fastdiff_replaced["forward"] is norm._fastdiff_original.forward
        and not is_watched(norm, activation)
    )


def takes(norm: nn.GroupNorm, x: object) -> bool:
    """Whether the op computes this; torch's group_norm has more: (N, C), quantized numbers, DTensor
    and other subclasses with rules of their own. A tracer's proxy is not a tensor."""
    if not _is_plain(type(x)) or not 3 <= x.dim() <= 5 or not x.is_floating_point():
        return False
    if nn.GroupNorm.forward is not _group_norm_forward:  # someone replaced it, to count calls say
        return False
    weight = norm._parameters.get("weight")
    return weight is None or _is_plain(type(weight))


def _is_plain(cls: type) -> bool:
    if cls is Tensor or cls is nn.Parameter:
        return True
    # The tensors of tracers such as torch.export.
    return issubclass(cls, Tensor) and cls.__module__.startswith("torch._subclasses.")


def normalize(
    norm: nn.GroupNorm,
    x: Tensor,
    activation: str = "identity",
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The op with the module's parameters."""
    parameters = norm._parameters
    if "weight" in parameters:  # past nn.Module.__getattr__, 0.4 us each
        weight, bias = parameters["weight"], parameters["bias"]
    else:  # parametrized, or a replica of DataParallel
        weight, bias = norm.weight, norm.bias
    tokens = x.dim() == 3 and x.stride(1) == 1 and x.shape[1] > 1
    if tokens:  # in attention, a view (B, C, N) of (B, N, C): channels_last without a copy
        x = x.unsqueeze(3)
    y = group_norm_silu(
        x, norm.num_groups, weight, bias, norm.eps, channel_bias, scale, shift, activation
    )
    return y.squeeze(3) if tokens else y


class FusedGroupNorm(Fused):
    """A normalization alone."""

    def forward(self, input: Tensor) -> Tensor:
        return normalize(self, input) if takes(self, input) else NotImplemented


class PairedOwner(Fused):
    """A module that calls a normalization and right after it the activation."""

    @classmethod
    def _fastdiff_methods(cls, original: type, pairs: Pairs) -> dict[str, Callable]:
        return {
            name: rewritten(function, here, pair)
            for name, function in methods_of(original).items()
            if (here := pairs_in(function, pairs))
        }


def pair(owner: nn.Module, norm_name: str, activation_name: str, x: Tensor) -> Tensor:
    """`owner.activation(owner.norm(x))`, in the methods of a `PairedOwner`."""
    norm = getattr(owner, norm_name)
    if is_pair(norm, getattr(owner, activation_name, None)) and takes(norm, x):
        return normalize(norm, x, "silu")
    x = norm(x)
    return getattr(owner, activation_name)(x)


class FusedSequential(Fused):
    """A Sequential in which a normalization and the SiLU behind it are one op."""

    def forward(self, input: Tensor) -> Tensor:
        modules = iter(self._modules.values())
        here = next(modules, None)
        while here is not None:
            following = next(modules, None)
            if is_pair(here, following) and takes(here, input):
                input = normalize(here, input, "silu")
                following = next(modules, None)
            else:
                input = here(input)
            here = following
        return input


_SEQUENTIAL = nn.Sequential.forward, fused_class(FusedSequential, nn.Sequential).forward


class FusedResnetBlock2D(Fused):
    """diffusers' ResnetBlock2D: both normalizations with SiLU, the second with the time."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args, **kwargs) -> Tensor:
        activation = self.nonlinearity
        fusable = is_pair(self.norm1, activation) and is_pair(self.norm2, activation)
        unexpected = args or kwargs or (temb is not None and self.time_emb_proj is None)
        if not fusable or unexpected or not takes(self.norm1, input_tensor):
            return NotImplemented
        h = normalize(self.norm1, input_tensor, "silu")
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                input_tensor, h = resample(input_tensor), resample(h)
        h = self.conv1(h)
        time = temb
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(temb if self.skip_time_act else activation(temb))
        h = normalize(self.norm2, h, "silu", *_time_operands(self, h, time))
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + h) / self.output_scale_factor


def _time_operands(block: nn.Module, h: Tensor, time: Tensor | None) -> tuple[Tensor | None, ...]:
    """channel_bias, scale and shift of a ResnetBlock2D."""
    if time is None:
        return None, None, None
    if len(time) != len(h):  # one time for the whole batch is allowed there
        time = time.expand(len(h), -1)
    if block.time_embedding_norm == "scale_shift":
        return None, *time.chunk(2, dim=1)
    return time, None, None


class FusedResBlock(Fused):
    """The ResBlock of guided- and improved-diffusion: the second normalization with the time.

    The first is in a Sequential with its SiLU, which is patched by itself.
    """

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        layers = self.out_layers
        if type(layers).forward not in _SEQUENTIAL or is_watched(layers) or len(layers) < 2:
            return NotImplemented
        norm, activation, *rest = layers
        if not is_pair(norm, activation) or not takes(norm, x):
            return NotImplemented
        if getattr(self, "updown", False):
            h = self.h_upd(self.in_layers[:-1](x))
            x = self.x_upd(x)
            h = self.in_layers[-1](h)
        else:
            h = self.in_layers(x)
        time = self.emb_layers(emb).type(h.dtype)
        if self.use_scale_shift_norm:
            scale, shift = time.chunk(2, dim=1)
            h = normalize(norm, h, "silu", None, scale, shift)
        else:
            h = normalize(norm, h, "silu", time)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


KNOWN_NAMES: dict[type, str] = {
    FusedResnetBlock2D: (
        "norm1 nonlinearity upsample downsample conv1 time_emb_proj skip_time_act norm2 dropout "
        "time_embedding_norm conv2 conv_shortcut output_scale_factor torch chunk shape contiguous "
        "len get deprecate ValueError training scale USE_PEFT_BACKEND Upsample2D Downsample2D "
        "isinstance"
    ),
    FusedResBlock: (
        "updown in_layers h_upd x_upd emb_layers type dtype len shape dim use_scale_shift_norm "
        "out_layers torch th chunk skip_connection skip_t_emb zeros_like exchange_temb_dims "
        "rearrange"
    ),
}
"""All that the forwards of these blocks, in the versions so far, name. One that names more may do
more than compute its result."""
