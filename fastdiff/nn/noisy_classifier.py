"""A classifier of noisy images: half a U-Net, for classifier guidance (CG §4, Math §7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.nn.blocks import DownBlock, MidBlock, number_dropout
from fastdiff.nn.config import UNetConfig
from fastdiff.nn.embedding import TimestepEmbedding
from fastdiff.nn.group_norm_silu import GroupNormSiLU


class NoisyClassifier(nn.Module):
    """``classifier(x_t, t) -> logits (B, num_classes)``: log p(y | x_t) up to a constant.

    The way down of the U-Net that `config` describes, the mean over the pixels, a linear map
    (Dhariwal & Nichol 2021, §4, pool with attention instead). Train it with the cross entropy at
    x_t ~ q(x_t | x0) over all t: a classifier of clean images has no useful gradient there.

    Parameters
    ----------
    config : UNetConfig
        Widths, levels, blocks, time embedding; `config.num_classes` is not read.
    num_classes : int

    Examples
    --------
    >>> import torch
    >>> from fastdiff.nn import NoisyClassifier, preset_config
    >>> classifier = NoisyClassifier(preset_config("digits"), num_classes=10)
    >>> classifier(torch.zeros(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])).shape
    torch.Size([4, 10])
    """

    def __init__(self, config: UNetConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, got {num_classes}")
        self.config = config
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            config.channels, 4 * config.channels, config.time_embedding
        )
        before = (widths[0], *widths[:-1])
        self.down_blocks = nn.ModuleList(
            DownBlock(width, level, config) for level, width in enumerate(before)
        )
        self.mid_block = MidBlock(config)
        self.norm_out = GroupNormSiLU(config.num_groups, widths[-1], config.norm_eps)
        self.linear_out = nn.Linear(widths[-1], num_classes)
        number_dropout(self)
        nn.init.zeros_(self.linear_out.weight)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits of noisy images x_t (B, C, H, W) at 0-based timesteps t (B,)."""
        temb = F.silu(self.time_embedding(t))
        h = self.conv_in(x_t)
        for block in self.down_blocks:
            h = block(h, temb)[-1]
        h = self.norm_out(self.mid_block(h, temb))
        return self.linear_out(h.mean((2, 3)))
