"""What `patch` turns modules into: same object, attributes and state dict, another class.

A module gets a subclass of its own class, so `isinstance`, hooks, `deepcopy`, `.to()`, wrappers and
checkpoints go on as before, and giving the class back undoes it. Every fused forward first looks
whether someone watches the modules it would skip (hooks, a forward set on the instance, another
module in their place), and then runs the original code.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from fastdiff.ops import group_norm_silu

SILU_CLASSES: set[type] = {nn.SiLU}
"""Classes whose forward is x sigmoid(x); `patch` adds look-alikes that it has tried."""


class Fused:
    """Base of the mixins. `fused_class` sets `_mixin` and `_original`."""

    _mixin: type
    _original: type

    def __reduce_ex__(self, protocol: int):
        # The class is made at run time, so a pickle names what it is made of.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self._mixin, self._original), *state


@functools.cache
def fused_class(mixin: type, original: type) -> type:
    """The subclass of `original` whose forward is the mixin's."""
    attributes = {"_mixin": mixin, "_original": original, "__doc__": original.__doc__}
    verb = "Paired" if mixin.__name__.startswith("Paired") else "Fused"
    return type(verb + original.__name__, (mixin, original), attributes)


def _new(mixin: type, original: type) -> Fused:
    cls = fused_class(mixin, original)
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
    return (
        isinstance(norm, FusedGroupNorm)
        and type(activation) in SILU_CLASSES
        and not is_watched(norm, activation)
    )


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

    def forward(self, x: Tensor) -> Tensor:
        if not _is_image(x):
            return super().forward(x)
        return normalize(self, x)


class PairedGroupNorm(FusedGroupNorm):
    """A normalization that also applies the activation which its owner calls next."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_image(x) or is_watched(self, *self._partner):
            return super().forward(x)
        return normalize(self, x, "silu")


class PairedActivation(Fused):
    """The activation that the normalization before it has already applied."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_image(x) or is_watched(self, *self._partner):
            return super().forward(x)
        return x


class FusedSequential(Fused):
    """A Sequential in which a normalization and the SiLU behind it are one op."""

    def forward(self, input):
        modules = iter(self._modules.values())
        here = next(modules, None)
        while here is not None:
            following = next(modules, None)
            if is_pair(here, following) and _is_image(input):
                input = normalize(here, input, "silu")
                following = next(modules, None)
            else:
                input = here(input)
            here = following
        return input


class FusedResnetBlock2D(Fused):
    """diffusers' ResnetBlock2D: both normalizations with SiLU, the second with the time."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args, **kwargs) -> Tensor:
        activation = self.nonlinearity
        fusable = is_pair(self.norm1, activation) and is_pair(self.norm2, activation)
        unexpected = args or kwargs or (temb is not None and self.time_emb_proj is None)
        if not fusable or unexpected:
            return super().forward(input_tensor, temb, *args, **kwargs)
        h = normalize(self.norm1, input_tensor, "silu")
        for resample in (self.upsample, self.downsample):
            if resample is not None:
                input_tensor, h = resample(input_tensor), resample(h)
        h = self.conv1(h)
        time = temb
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(temb if self.skip_time_act else activation(temb))
        h = normalize(self.norm2, h, "silu", *self._time_operands(h, time))
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + h) / self.output_scale_factor

    def _time_operands(self, h: Tensor, time: Tensor | None) -> tuple[Tensor | None, ...]:
        """channel_bias, scale and shift."""
        if time is None:
            return None, None, None
        if len(time) != len(h):  # one time for the whole batch is allowed there
            time = time.expand(len(h), -1)
        if self.time_embedding_norm == "scale_shift":
            return None, *time.chunk(2, dim=1)
        return time, None, None


class FusedResBlock(Fused):
    """The ResBlock of guided- and improved-diffusion: the second normalization with the time.

    The first is in a Sequential with its SiLU, which is patched by itself.
    """

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, *rest = self.out_layers
        if not is_pair(norm, activation) or is_watched(self.out_layers):
            return super()._forward(x, emb)
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


def _is_image(x: Tensor) -> bool:
    """Whether the op takes x; torch's group_norm has more: (N, C), quantized numbers."""
    return 3 <= x.dim() <= 5 and x.is_floating_point()
