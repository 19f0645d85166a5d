"""Residual blocks, resampling, and the levels that a U-Net is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdiff.nn.attention import SelfAttention
from fastdiff.nn.config import UNetConfig
from fastdiff.nn.group_norm_silu import GroupNormSiLU
from fastdiff.nn.merging import BlockInputs, Merged, with_common_bias, without_bias


def norm_conv(
    norm: GroupNormSiLU,
    conv: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    recompute: bool = False,
    **operands: torch.Tensor | float,
) -> torch.Tensor:
    """``conv(norm(x, **operands))``.

    With `recompute` the convolution's input is not kept for the backward pass but normalized again
    from `x`, which the normalization keeps anyway: one forward pass of the normalization more, and
    one activation less. The convolution itself does not run again.
    """

    def run(x: torch.Tensor, **operands: torch.Tensor | float) -> torch.Tensor:
        return conv(norm(x, **operands))

    if not (recompute and torch.is_grad_enabled()):
        return run(x, **operands)
    # The second run ends, by checkpoint's early stop, when the convolution has got its input. No
    # random state matters: dropout's mask is a function of its keys.
    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, **operands)


def new_dropout_keys(x: torch.Tensor) -> torch.Tensor:
    """Keys (B,) for the masks of dropout, from torch's random state on the device of `x`."""
    info = torch.iinfo(torch.int64)
    return torch.randint(info.min, info.max, (x.shape[0],), dtype=torch.int64, device=x.device)


# torch.fx's tracer, which knows no shapes, puts a call of it into the graph.
torch.fx.wrap("new_dropout_keys")

# Masks of a network's layers are made from the same keys: each layer has a stream of its own, far
# from the numbers of steps that samplers count with.
_FIRST_DROPOUT_STREAM = 1 << 40


def number_dropout(network: nn.Module) -> None:
    """Give each residual block of a network a stream of its own for its dropout."""
    resnets = [module for module in network.modules() if isinstance(module, ResnetBlock)]
    for index, resnet in enumerate(resnets):
        resnet.dropout_stream = _FIRST_DROPOUT_STREAM + index


class Summands(NamedTuple):
    """What a residual block ends in, for the normalization that follows to add up."""

    x: torch.Tensor
    residual: torch.Tensor
    bias: torch.Tensor | None
    """(C,): of convolutions that left it out."""


class ResnetBlock(nn.Module):
    """``shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))), time))))``.

    With ``e = time_emb_proj(temb)``, the time enters the second normalization as ``norm2(h + e)``
    ("additive", DDPM appendix B) or as ``norm2(h) * (1 + e_scale) + e_shift`` ("scale_shift",
    IDDPM's code and arXiv 2105.05233 eq. 6). Both are arguments of the one fused op.

    `temb` (B, 4 * config.channels) has already gone through SiLU: it is the same in all blocks.
    Or it is what `fastdiff.nn.merging` made of it for this block. With `recompute`, the inputs of
    both convolutions are computed again in the backward pass.

    `resample`, one of `halved` and `doubled`, is applied to the input and to what its first
    normalization gives: a block that resamples (`UNetConfig.resblock_updown`).

    Dropout is part of the second normalization (Math §9): its masks belong to `dropout_keys` (B,)
    int64 and the block's `dropout_stream`. Without keys, training draws some.
    """

    recompute = False
    dropout_stream = _FIRST_DROPOUT_STREAM

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: UNetConfig,
        resample: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift = config.time_conditioning == "scale_shift"
        self.norm1 = GroupNormSiLU(config.num_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(
            4 * config.channels, 2 * out_channels if self.scale_shift else out_channels
        )
        self.norm2 = GroupNormSiLU(config.num_groups, out_channels, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(
        self,
        x: torch.Tensor,
        temb: torch.Tensor | BlockInputs,
        dropout_keys: torch.Tensor | None = None,
        normed: torch.Tensor | None = None,
        add: bool = True,
    ) -> torch.Tensor | Summands:
        """`normed` takes the place of ``norm1(x)``; with `add` off the last sum is left out."""
        merged = isinstance(temb, BlockInputs)
        time = temb.time if merged else self.time_emb_proj(temb)
        conv1 = functools.partial(without_bias, self.conv1) if merged else self.conv1
        if self.resample is not None:
            conv1 = _after(self.resample, conv1)
        if normed is None:
            h = norm_conv(self.norm1, conv1, x, recompute=self.recompute)
        else:
            h = conv1(normed)
        if self.resample is not None:
            x = self.resample(x)
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            operands = {"scale": scale, "shift": shift}
            if merged:
                operands["channel_bias"] = self.conv1.bias.expand(x.shape[0], -1)
        else:
            operands = {"channel_bias": time}
        if self.dropout.training and self.dropout.p > 0:
            operands["dropout_p"] = self.dropout.p
            operands["seed"] = new_dropout_keys(x) if dropout_keys is None else dropout_keys
            operands["stream"] = self.dropout_stream
        shortcut, conv2, bias = self.conv_shortcut, self.conv2, None
        if merged and not add:
            bias = self.conv2.bias if temb.bias is None else temb.bias
            conv2 = functools.partial(without_bias, conv2)
            if temb.bias is not None:
                shortcut = functools.partial(without_bias, shortcut)
        elif merged and temb.bias is not None:
            shortcut, conv2 = with_common_bias(shortcut, conv2, temb.bias, x)
        h = norm_conv(self.norm2, conv2, h, recompute=self.recompute, **operands)
        if add:
            return shortcut(x) + h
        return Summands(h, shortcut(x), bias)


def halved(x: torch.Tensor) -> torch.Tensor:
    """The mean of 2x2 pixels."""
    return F.avg_pool2d(x, 2)


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Every pixel repeated, 2x2 times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _after(
    first: Callable[[torch.Tensor], torch.Tensor], second: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: second(first(x))


class Downsample(nn.Module):
    """Halve height and width: a 3x3 convolution of stride 2, or the mean of 2x2 pixels."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.pad_right = config.downsample_padding == "right"
        self.conv = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.pad_right else 1)
            if config.conv_resample
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is None:
            return halved(x)
        if self.pad_right:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then a 3x3 convolution if so configured."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if config.conv_resample else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = doubled(x)
        return x if self.conv is None else self.conv(x)


Time = torch.Tensor | Merged
"""What levels hand to their blocks: the time embedding after SiLU, or merged parameters."""


Keys = torch.Tensor | None
"""The keys of the masks of dropout."""


def _resnet(
    resnet: ResnetBlock,
    x: torch.Tensor,
    temb: Time,
    keys: Keys,
    normed: torch.Tensor | None,
    following: GroupNormSiLU | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The block's output, and what the norm that follows, if one does, makes of it.

    `normed`: what the block's own first norm made of `x`, if it is known.
    """
    time = temb.block() if isinstance(temb, Merged) else temb
    if following is None or not _is_plain(resnet):
        return resnet(x, time, keys, normed), None
    summands = resnet(x, time, keys, normed, add=False)
    if not isinstance(x, torch.fx.Proxy) and summands.x.dtype != summands.residual.dtype:
        return sum(part[..., None, None] if part.dim() == 1 else part for part in summands), None
    return following.of_sum(*summands)


def first_norm(modules: Iterable[nn.Module]) -> GroupNormSiLU | None:
    """The normalization that the first of `modules` which computes anything begins with.

    None if there is none, or if it is only the module's own to call.
    """
    for module in modules:
        if isinstance(module, nn.Identity):
            continue
        norm = None
        if isinstance(module, SelfAttention):
            norm = module.group_norm
        elif isinstance(module, ResnetBlock) and not module.recompute:
            norm = module.norm1
        elif isinstance(module, GroupNormSiLU):
            norm = module
        return norm if norm is not None and _is_plain(module) and _is_plain(norm) else None
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody watches what goes into a module of ours and comes out of it, as hooks do and
    FSDP, whose parameters are whole only in between."""
    return type(module) in (GroupNormSiLU, ResnetBlock, SelfAttention) and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _attend(
    attention: nn.Module, x: torch.Tensor, temb: Time, normed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output of an attention; where there is none, `x` and what was known of it."""
    if isinstance(attention, nn.Identity):
        return x, normed
    qkv = temb.attention() if isinstance(temb, Merged) else None
    return attention(x, qkv, normed), None


def _resample(module: nn.Module, x: torch.Tensor, temb: Time, dropout_keys: Keys) -> torch.Tensor:
    if isinstance(module, ResnetBlock):
        return _resnet(module, x, temb, dropout_keys, None, None)[0]
    return module(x)


def _attention(channels: int, config: UNetConfig) -> SelfAttention:
    return SelfAttention(channels, config.heads(channels), config.num_groups, config.norm_eps)


def _downsampler(channels: int, config: UNetConfig) -> nn.Module:
    if config.resblock_updown:
        return ResnetBlock(channels, channels, config, halved)
    return Downsample(channels, config)


def _upsampler(channels: int, config: UNetConfig) -> nn.Module:
    if config.resblock_updown:
        return ResnetBlock(channels, channels, config, doubled)
    return Upsample(channels, config)


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, each with attention if the level has it, then
    a downsampling unless the level is the last. Returns the output of every step, for the skips."""

    def __init__(self, in_channels: int, level: int, config: UNetConfig) -> None:
        super().__init__()
        width = config.widths[level]
        has_attention = config.resolutions[level] in config.attention_resolutions
        is_last = level == len(config.widths) - 1
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else width, width, config)
            for i in range(config.num_res_blocks)
        )
        self.attentions = nn.ModuleList(
            _attention(width, config) if has_attention else nn.Identity() for _ in self.resnets
        )
        self.downsamplers = nn.ModuleList([] if is_last else [_downsampler(width, config)])

    def forward(self, h: torch.Tensor, temb: Time, dropout_keys: Keys = None) -> list[torch.Tensor]:
        outputs, normed = [], None
        for i, (resnet, attention) in enumerate(zip(self.resnets, self.attentions, strict=True)):
            following = first_norm((attention, *self.resnets[i + 1 : i + 2]))
            h, normed = _resnet(resnet, h, temb, dropout_keys, normed, following)
            h, normed = _attend(attention, h, temb, normed)
            outputs.append(h)
        for downsample in self.downsamplers:
            outputs.append(_resample(downsample, outputs[-1], temb, dropout_keys))
        return outputs


class MidBlock(nn.Module):
    """The lowest resolution: two residual blocks with attention between them."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.resnets = nn.ModuleList(ResnetBlock(width, width, config) for _ in range(2))
        self.attentions = nn.ModuleList(
            [_attention(width, config) if config.mid_attention else nn.Identity()]
        )

    def forward(self, h: torch.Tensor, temb: Time, dropout_keys: Keys = None) -> torch.Tensor:
        (first, last), attention = self.resnets, self.attentions[0]
        following = first_norm((attention, last))
        h, normed = _resnet(first, h, temb, dropout_keys, None, following)
        h, normed = _attend(attention, h, temb, normed)
        return _resnet(last, h, temb, dropout_keys, normed, None)[0]


class UpBlock(nn.Module):
    """One level on the way up: residual blocks that each take one skip, with attention if the
    level has it, then an upsampling unless the level is the first."""

    def __init__(
        self, in_channels: int, skip_channels: list[int], level: int, config: UNetConfig
    ) -> None:
        super().__init__()
        width = config.widths[level]
        has_attention = config.resolutions[level] in config.attention_resolutions
        self.resnets = nn.ModuleList(
            ResnetBlock((in_channels if i == 0 else width) + skip, width, config)
            for i, skip in enumerate(skip_channels)
        )
        self.attentions = nn.ModuleList(
            _attention(width, config) if has_attention else nn.Identity() for _ in self.resnets
        )
        self.upsamplers = nn.ModuleList([_upsampler(width, config)] if level else [])

    def forward(
        self,
        h: torch.Tensor,
        skips: list[torch.Tensor],
        temb: Time,
        dropout_keys: Keys = None,
        last_norm: GroupNormSiLU | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and what `last_norm` makes of it, if that is given and can be known."""
        normed = None
        for i, (resnet, attention) in enumerate(zip(self.resnets, self.attentions, strict=True)):
            h = torch.cat([h, skips.pop()], dim=1)
            behind = (last_norm,) if last_norm and i == len(self.resnets) - 1 else ()
            following = first_norm((attention, *behind))
            h, normed = _resnet(resnet, h, temb, dropout_keys, None, following)
            h, normed = _attend(attention, h, temb, normed)
        for upsample in self.upsamplers:
            h = _resample(upsample, h, temb, dropout_keys)
        return h, normed
