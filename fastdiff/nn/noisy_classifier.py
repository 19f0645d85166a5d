"""A classifier of noisy images: half a U-Net, for classifier guidance (CG §4, Math §7)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.nn import original_formats
from fastdiff.nn.blocks import DownBlock, MidBlock, number_dropout
from fastdiff.nn.config import UNetConfig
from fastdiff.nn.embedding import TimestepEmbedding
from fastdiff.nn.group_norm_silu import GroupNormSiLU
from fastdiff.nn.presets import preset_config

POOLS = ("mean", "attention")


class AttentionPool(nn.Module):
    """The attention of the pixels' mean to itself and all pixels, (B, C, H, W) -> (B, C).

    Positions are learned (CLIP, arXiv 2103.00020, §2.4), so that it is made for one size of map.
    """

    def __init__(self, channels: int, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.empty(size * size + 1, channels))
        self.qkv = nn.Linear(channels, 3 * channels)
        nn.init.normal_(self.positional_embedding, std=channels**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool a map of the size that the module was made for."""
        h = x.flatten(2).transpose(1, 2)
        h = torch.cat([h.mean(1, keepdim=True), h], 1) + self.positional_embedding
        q, k, v = self.qkv(h).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1)


class NoisyClassifier(nn.Module):
    """``classifier(x_t, t) -> logits (B, num_classes)``: log p(y | x_t) up to a constant.

    The way down of the U-Net that `config` describes, a pooling over the pixels, a linear map.
    Train it with the cross entropy at x_t ~ q(x_t | x0) over all t: a classifier of clean images
    has no useful gradient there.

    Parameters
    ----------
    config : UNetConfig
        Widths, levels, blocks, time embedding; `config.num_classes` is not read.
    num_classes : int
    pool : {"mean", "attention"}
        The mean, or attention as in Dhariwal & Nichol 2021, §4, which takes images of
        `config.sample_size` only.

    Examples
    --------
    >>> import torch
    >>> from fastdiff.nn import NoisyClassifier, preset_config
    >>> classifier = NoisyClassifier(preset_config("digits"), num_classes=10)
    >>> classifier(torch.zeros(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])).shape
    torch.Size([4, 10])
    """

    def __init__(self, config: UNetConfig, num_classes: int, pool: str = "mean") -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, got {num_classes}")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
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
        self.pool = (
            None
            if pool == "mean"
            else AttentionPool(widths[-1], config.resolutions[-1], config.heads(widths[-1]))
        )
        self.linear_out = nn.Linear(widths[-1], num_classes)
        number_dropout(self)
        nn.init.zeros_(self.linear_out.weight)

    @classmethod
    def from_original(
        cls,
        source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        config: str | UNetConfig,
        num_classes: int = 1000,
        pool: str = "attention",
    ) -> NoisyClassifier:
        """Load a classifier of guided-diffusion, in eval mode.

        Parameters
        ----------
        source : path or mapping
            A .pt or .safetensors file, or the state dict itself. Files are read without running
            code.
        config : str or UNetConfig
            The architecture: "adm_classifier64" to "adm_classifier512" are the released ones.
        num_classes : int
        pool : {"mean", "attention"}
            Their ``classifier_pool``: "adaptive" is the mean.

        Raises
        ------
        FileNotFoundError
        fastdiff.nn.original_formats.UnknownCheckpointError
            Names or shapes do not fit the configuration.
        """
        with torch.device("meta"):
            config = preset_config(config) if isinstance(config, str) else config
            classifier = cls(config, num_classes, pool)
        original_formats.load_classifier_into(classifier, source)
        return classifier.requires_grad_(True).eval()

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits of noisy images x_t (B, C, H, W) at 0-based timesteps t (B,)."""
        temb = F.silu(self.time_embedding(t))
        h = self.conv_in(x_t)
        for block in self.down_blocks:
            h = block(h, temb)[-1]
        h = self.norm_out(self.mid_block(h, temb))
        if self.pool is None:
            return self.linear_out(h.mean((2, 3)))
        size = self.config.sample_size
        if x_t.shape[2:] != (size, size):
            raise ValueError(
                f"x_t must have {size} x {size} pixels for pooling with attention, got "
                f"{x_t.shape[2]} x {x_t.shape[3]}"
            )
        return self.linear_out(self.pool(h))
