"""The U-Net of DDPM's and DDIM's PyTorch code, reduced to what a checkpoint sees.

Written anew with that code's names, shapes and arithmetic: 1x1 convolutions in attention, padding
below and to the right before a strided convolution, [sin, cos] embedding, eps 1e-6.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class ResnetBlock(nn.Module):
    def __init__(self, inside, outside, temb, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.temb_proj = nn.Linear(temb, outside)
        self.norm2 = nn.GroupNorm(groups, outside, eps=1e-6)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weight = torch.softmax(torch.bmm(q.mT, k) / math.sqrt(q.shape[1]), dim=2)
        return x + self.proj_out(torch.bmm(v, weight.mT).reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=int(up))

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Level(nn.Module):
    def __init__(self, block, attn):
        super().__init__()
        self.block, self.attn = nn.ModuleList(block), nn.ModuleList(attn)


class Model(nn.Module):
    """From our configuration."""

    def __init__(self, config):
        super().__init__()
        self.ch = ch = config.channels
        temb, groups, last = 4 * ch, config.num_groups, len(config.widths) - 1
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb), nn.Linear(temb, temb)])
        self.conv_in = nn.Conv2d(config.in_channels, ch, 3, padding=1)

        def level(number, sizes, width):
            has = config.resolutions[number] in config.attention_resolutions
            blocks = [ResnetBlock(size, width, temb, groups) for size in sizes]
            return Level(blocks, [AttnBlock(width, groups) for _ in blocks] if has else [])

        self.down = nn.ModuleList()
        skips = [ch]
        for number, width in enumerate(config.widths):
            sizes = [ch] + [width] * (config.num_res_blocks - 1)
            self.down.append(level(number, sizes, width))
            ch = width
            skips += [ch] * config.num_res_blocks
            if number != last:
                self.down[-1].downsample = Resample(ch, up=False)
                skips.append(ch)
        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(ch, ch, temb, groups)
        self.mid.attn_1 = AttnBlock(ch, groups)
        self.mid.block_2 = ResnetBlock(ch, ch, temb, groups)
        self.up = nn.ModuleList()
        for number in reversed(range(last + 1)):
            width = config.widths[number]
            sizes = []
            for _ in range(config.num_res_blocks + 1):
                sizes.append(ch + skips.pop())
                ch = width
            self.up.insert(0, level(number, sizes, width))
            if number:
                self.up[0].upsample = Resample(ch, up=True)
        self.norm_out = nn.GroupNorm(groups, ch, eps=1e-6)
        self.conv_out = nn.Conv2d(ch, config.out_channels, 3, padding=1)

    def forward(self, x, t):
        half = self.ch // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        angles = t.float()[:, None] * frequencies
        temb = self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], dim=1))
        temb = self.temb.dense[1](F.silu(temb))
        hs = [self.conv_in(x)]
        for level in self.down:
            for i, block in enumerate(level.block):
                h = block(hs[-1], temb)
                hs.append(level.attn[i](h) if level.attn else h)
            if hasattr(level, "downsample"):
                hs.append(level.downsample(hs[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for level in reversed(self.up):
            for i, block in enumerate(level.block):
                h = block(torch.cat([h, hs.pop()], dim=1), temb)
                h = level.attn[i](h) if level.attn else h
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
