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
    def __init__(self, channels, num_heads, groups):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm32(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        batch, channels, *spatial = x.shape
        x = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(x)).reshape(batch * self.num_heads, -1, x.shape[2])
        q, k, v = qkv.chunk(3, dim=1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1]), -1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(batch, channels, -1)
        return (x + self.proj_out(h)).reshape(batch, channels, *spatial)


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
    """From our configuration (groups and embedding width are fixed in the originals)."""

    def __init__(self, config, silu=nn.SiLU):
        super().__init__()
        self.channels = ch = config.channels
        emb = 4 * ch

        def res(a, b):
            return ResBlock(
                a, b and emb, b, config.num_groups, config.time_conditioning == "scale_shift",
                silu=silu,
            )  # fmt: skip

        def attention(level, width):
            has = config.resolutions[level] in config.attention_resolutions
            return [AttentionBlock(width, config.num_heads, config.num_groups)] if has else []

        self.time_embed = nn.Sequential(nn.Linear(ch, emb), silu(), nn.Linear(emb, emb))
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_class_embeddings, emb)
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(config.in_channels, ch, 3, padding=1))]
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
                self.input_blocks.append(TimestepEmbedSequential(Downsample(ch)))
                skips.append(ch)
        self.middle_block = TimestepEmbedSequential(
            res(ch, ch), AttentionBlock(ch, config.num_heads, config.num_groups), res(ch, ch)
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            width = config.widths[level]
            for i in range(config.num_res_blocks + 1):
                layers = [res(ch + skips.pop(), width), *attention(level, width)]
                ch = width
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(ch))
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
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)
