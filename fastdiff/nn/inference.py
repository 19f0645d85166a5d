"""The inference form of the U-Net: the same network, computed as a CPU samples it fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nn.attention import SelfAttention
from fastdiff.nn.blocks import (
    DownBlock,
    Downsample,
    MidBlock,
    ResnetBlock,
    UpBlock,
    Upsample,
    doubled,
    halved,
)
from fastdiff.nn.embedding import TimestepEmbedding
from fastdiff.nn.group_norm_silu import GroupNormSiLU
from fastdiff.nn.packed_conv import PackedConv
from fastdiff.reference.layout import memory_format_of

DTYPES = (torch.float32, torch.bfloat16)
_KNOWN = {
    nn.Conv2d, nn.Dropout, nn.Embedding, nn.Identity, nn.Linear, nn.ModuleList, nn.Sequential,
    DownBlock, Downsample, GroupNormSiLU, MidBlock, ResnetBlock, SelfAttention, TimestepEmbedding,
    UpBlock, Upsample,
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class InferenceUNet:
    """A U-Net's predictions without gradients, on a CPU; made by `UNet.for_inference`.

    Called like the U-Net and returns the same to rounding. It differs in how it computes:

    - 3x3 convolutions by Winograd's F(2x2, 3x3) in float32 on maps of 8x8 and more, the others by
      oneDNN with weights reordered once (`PackedConv`); residuals are added where the convolution
      writes;
    - q, k and v of an attention in one product, the time projections of all blocks in one;
    - channels_last inside, and with ``dtype=torch.bfloat16`` bfloat16 throughout, except the time
      embedding, which is float32.

    The weights are copies in another order, made when they are first needed. Every call looks
    whether the U-Net's own have changed since (storage or version of a parameter, or a module put
    in its place) and makes them anew; only writes through ``.data`` or NumPy go unseen. Dropout
    does not happen.

    Winograd's sums mix the pixels of a 4x4 neighbourhood: around an infinity or a NaN in an
    activation, up to a pixel more of a convolution's result is NaN than otherwise.
    """

    def __init__(self, unet: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in DTYPES:
            raise TypeError(f"dtype is {dtype}, expected torch.float32 or torch.bfloat16")
        if (reason := why_no_inference_form(unet)) is not None:
            raise ValueError(f"this U-Net has no inference form: {reason}")
        self.unet = unet
        self.config = unet.config
        self.dtype = dtype
        self._prepare()

    @torch.no_grad()
    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> Tensor:
        """As `UNet.forward`; the result has no gradient, and the dtype of `x_t`."""
        unet = self.unet
        unet._check_inputs(x_t, t, y, x_self_cond)
        if self._is_stale():
            if (reason := why_no_inference_form(unet)) is not None:
                raise RuntimeError(f"the U-Net has no inference form any more: {reason}")
            self._prepare()
        with torch.autocast("cpu", enabled=False):
            return self._forward(x_t, t, y, x_self_cond)

    def _forward(
        self, x_t: Tensor, t: Tensor, y: Tensor | None, x_self_cond: Tensor | None
    ) -> Tensor:
        unet, time, h = self.unet, self._time(t, y), x_t
        if unet.config.self_conditioning:
            estimate = torch.zeros_like(x_t) if x_self_cond is None else x_self_cond
            h = torch.cat([x_t, estimate.to(x_t.dtype)], 1)
        h = self._convs[unet.conv_in](h.to(self.dtype, memory_format=torch.channels_last))
        skips = [h]
        for block in unet.down_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = self._attend(attention, self._residual(resnet, h, time))
                skips.append(h)
            for downsample in block.downsamplers:
                h = self._downsample(downsample, h, time)
                skips.append(h)
        first, last = unet.mid_block.resnets
        h = self._attend(unet.mid_block.attentions[0], self._residual(first, h, time))
        h = self._residual(last, h, time)
        for block in unet.up_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = torch.cat([h, skips.pop()], dim=1)
                h = self._attend(attention, self._residual(resnet, h, time))
            for upsample in block.upsamplers:
                h = self._upsample(upsample, h, time)
        h = self._convs[unet.conv_out](unet.conv_norm_out(h))
        return h.to(x_t.dtype, memory_format=memory_format_of(x_t))

    def _prepare(self) -> None:
        modules = list(self.unet.modules())
        self._watched = [
            (members, name, member)
            for module in modules
            for members in (module._modules, module._parameters)
            for name, member in members.items()
        ]
        self._versions = [_version(p) for p in self.unet.parameters()]
        self._parameters = list(self.unet.parameters())
        self._convs = {m: PackedConv(m, self.dtype) for m in modules if isinstance(m, nn.Conv2d)}
        self._resnets = [m for m in modules if isinstance(m, ResnetBlock)]
        projections = [m.time_emb_proj for m in self._resnets]
        self._time_sizes = [linear.out_features for linear in projections]
        self._time_weight = _joined([linear.weight for linear in projections], torch.float32)
        self._time_bias = _joined([linear.bias for linear in projections], torch.float32)
        self._linears = {}
        for m in modules:
            if isinstance(m, SelfAttention):
                three = (m.to_q, m.to_k, m.to_v)
                for key, linears in ((m.to_q, three), (m.to_out, tuple(m.to_out))):
                    weight = _joined([linear.weight for linear in linears], self.dtype)
                    bias = _joined([linear.bias for linear in linears], self.dtype)
                    self._linears[key] = weight, bias

    def _is_stale(self) -> bool:
        return any(
            members.get(name) is not member for members, name, member in self._watched
        ) or self._versions != [_version(p) for p in self._parameters]

    def _time(self, t: Tensor, y: Tensor | None) -> dict[nn.Module, Tensor]:
        """What `time_emb_proj` gives, of every block."""
        temb = self.unet.time_embedding(t)
        if self.unet.class_embedding is not None:
            temb = temb + self.unet.class_embedding(y)
        joined = F.linear(F.silu(temb), self._time_weight, self._time_bias)
        return dict(zip(self._resnets, joined.split(self._time_sizes, dim=1), strict=True))

    def _residual(self, block: ResnetBlock, x: Tensor, times: dict[nn.Module, Tensor]) -> Tensor:
        h = block.norm1(x)
        if block.resample is doubled:
            h, x = self._convs[block.conv1](h, upsample=True), doubled(x)
        elif block.resample is halved:
            h, x = self._convs[block.conv1](halved(h)), halved(x)
        else:
            h = self._convs[block.conv1](h)
        time = times[block]
        if block.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = block.norm2(h, scale=scale, shift=shift)
        else:
            h = block.norm2(h, channel_bias=time)
        shortcut = self._convs.get(block.conv_shortcut)
        return self._convs[block.conv2](h, x if shortcut is None else shortcut(x))

    def _attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(attention, SelfAttention):
            return x
        batch, channels, height, width = x.shape
        heads, depth = attention.num_heads, channels // attention.num_heads
        h = attention.group_norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        qkv = F.linear(h, *self._linears[attention.to_q])
        q, k, v = qkv.view(batch, height * width, 3, heads, depth).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, *self._linears[attention.to_out])
        return x + h.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _downsample(
        self, module: Downsample | ResnetBlock, h: Tensor, times: dict[nn.Module, Tensor]
    ) -> Tensor:
        if isinstance(module, ResnetBlock):
            return self._residual(module, h, times)
        if module.conv is None:
            return halved(h)
        return self._convs[module.conv](F.pad(h, (0, 1, 0, 1)) if module.pad_right else h)

    def _upsample(
        self, module: Upsample | ResnetBlock, h: Tensor, times: dict[nn.Module, Tensor]
    ) -> Tensor:
        if isinstance(module, ResnetBlock):
            return self._residual(module, h, times)
        if module.conv is None:
            return doubled(h)
        return self._convs[module.conv](h, upsample=True)


def why_no_inference_form(unet: nn.Module) -> str | None:
    """Why a `fastdiff.UNet` cannot be computed in another way than its own; None if it can."""
    for name, module in unet.named_modules():
        what = f"{name or 'it'} is a {type(module).__name__}"
        if type(module) not in _KNOWN and module is not unet:
            return f"{what}, which it does not know"
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return f"{what} with a hook"
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return f"{what} with a forward of its own"
    for name, parameter in unet.named_parameters():
        if type(parameter.data) is not Tensor or parameter.device.type != "cpu":
            return f"{name} is not a tensor on a CPU"
        if parameter.dtype != torch.float32:
            return f"{name} is {parameter.dtype}, not float32"
    return None


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.detach() for tensor in tensors]).to(dtype)


def _version(parameter: Tensor) -> tuple[int, int]:
    """Changes with the storage and with every write that autograd would see."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version
