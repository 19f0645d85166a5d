"""The U-Net of improved- and guided-diffusion, reduced to what a checkpoint and `patch` see.

Written anew with the names, shapes and arithmetic of OpenAI's repositories: module attributes,
order of channels in qkv, [cos, sin] embedding, normalization in float32.
"""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class SiLU(nn.Module):
    """improved-diffusion brings its own."""

    def forward(self, x):
        return x * torch.sigmoid(x)


def conv_nd(dims, *args, **kwargs):
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


class Downsample(nn.Module):
    def __init__(self, channels, use_conv=True, dims=2):
        super().__init__()
        self.op = (
            conv_nd(dims, channels, channels, 3, stride=2, padding=1)
            if use_conv
            else nn.AvgPool2d(2)
        )

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels, use_conv=True, dims=2):
        super().__init__()
        self.use_conv = use_conv
        if use_conv:
            self.conv = conv_nd(dims, channels, channels, 3, padding=1)

    def forward(self, x):
        x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class ResBlock(nn.Module):
    def __init__(
        self, channels, emb_channels, out_channels, groups, use_scale_shift_norm, up=False,
        down=False, dims=2, silu=SiLU, use_checkpoint=False,
    ):  # fmt: skip
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            GroupNorm32(groups, channels),
            silu(),
            conv_nd(dims, channels, out_channels, 3, padding=1),
        )
        self.updown = up or down
        resample = {(True, False): Upsample, (False, True): Downsample}.get((up, down))
        self.h_upd, self.x_upd = (
            resample(channels, False, dims) if resample else nn.Identity() for _ in range(2)
        )
        self.emb_layers = nn.Sequential(
            silu(),
            nn.Linear(emb_channels, (2 if use_scale_shift_norm else 1) * out_channels),
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(groups, out_channels),
            silu(),
            nn.Dropout(0.1),
            conv_nd(dims, out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else conv_nd(dims, channels, out_channels, 1)
        )

    def forward(self, x, emb):
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x, emb):
        if self.updown:
            before, conv = self.in_layers[:-1], self.in_layers[-1]
            h = self.h_upd(before(x))
            x = self.x_upd(x)
            h = conv(h)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while emb_out.dim() < h.dim():
            emb_out = emb_out[..., None]
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels, num_heads, groups, new_order=False):
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.norm = GroupNorm32(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        batch, channels, *spatial = x.shape
        x = x.reshape(batch, channels, -1)
        h = attend(self.qkv(self.norm(x)), self.num_heads, self.new_order)
        return (x + self.proj_out(h)).reshape(batch, channels, *spatial)


def attend(qkv, num_heads, new_order):
    batch, channels, pixels = len(qkv), qkv.shape[1] // 3, qkv.shape[2]
    if new_order:  # all heads' q, then all heads' k, then all heads' v
        q, k, v = (part.reshape(batch * num_heads, -1, pixels) for part in qkv.chunk(3, dim=1))
    else:
        q, k, v = qkv.reshape(batch * num_heads, -1, pixels).chunk(3, dim=1)
    weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1]), -1)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(batch, channels, pixels)


class AttentionPool2d(nn.Module):
    def __init__(self, size, channels, num_heads, outputs):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], 2) + self.positional_embedding
        return self.c_proj(attend(self.qkv_proj(x), self.num_heads, True))[:, :, 0]


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def timestep_embedding(t, dim):
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetModel(nn.Module):
    """From our configuration (groups and embedding width are fixed in the originals).

    With `pool` and `num_classes` EncoderUNetModel, the classifier: no way up, logits.
    """

    def __init__(self, config, silu=nn.SiLU, new_order=False, pool=None, num_classes=0):
        super().__init__()
        self.channels = config.channels
        emb = 4 * config.channels
        ch = config.widths[0]
        inputs = config.in_channels * (2 if config.self_conditioning else 1)

        def res(a, b, **updown):
            return ResBlock(
                a, b and emb, b, config.num_groups, config.time_conditioning == "scale_shift",
                silu=silu, **updown,
            )  # fmt: skip

        def attention_block(width):
            if config.num_head_channels is None:
                heads = config.num_heads
            else:
                heads = width // config.num_head_channels
            return AttentionBlock(width, heads, config.num_groups, new_order)

        def attention(level, width):
            has = config.resolutions[level] in config.attention_resolutions
            return [attention_block(width)] if has else []

        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, emb), silu(), nn.Linear(emb, emb)
        )
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_class_embeddings, emb)
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(inputs, ch, 3, padding=1))]
        )
        skips = [ch]
        last = len(config.widths) - 1
        for level, width in enumerate(config.widths):
            for _ in range(config.num_res_blocks):
                layers = [res(ch, width), *attention(level, width)]
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                ch = width
                skips.append(ch)
            if level != last:
                down = res(ch, ch, down=True) if config.resblock_updown else Downsample(ch)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skips.append(ch)
        self.middle_block = TimestepEmbedSequential(res(ch, ch), attention_block(ch), res(ch, ch))
        if pool is not None:
            heads = ch // config.num_head_channels
            tail = {
                "attention": [AttentionPool2d(config.resolutions[-1], ch, heads, num_classes)],
                "adaptive": [nn.AdaptiveAvgPool2d(1), nn.Conv2d(ch, num_classes, 1), nn.Flatten()],
            }[pool]
            self.out = nn.Sequential(GroupNorm32(config.num_groups, ch), silu(), *tail)
            self.output_blocks = None
            return
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            width = config.widths[level]
            for i in range(config.num_res_blocks + 1):
                layers = [res(ch + skips.pop(), width), *attention(level, width)]
                ch = width
                if level and i == config.num_res_blocks:
                    layers.append(res(ch, ch, up=True) if config.resblock_updown else Upsample(ch))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            GroupNorm32(config.num_groups, ch),
            silu(),
            nn.Conv2d(ch, config.out_channels, 3, padding=1),
        )

    def forward(self, x, t, y=None):
        emb = self.time_embed(timestep_embedding(t, self.channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        if self.output_blocks is None:
            return self.out(h)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)
