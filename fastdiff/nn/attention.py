"""Self-attention over the positions of a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.nn.group_norm_silu import GroupNormSiLU


class SelfAttention(nn.Module):
    """``x + out(softmax(q k^T / sqrt(d)) v)`` with q, k, v linear maps of ``norm(x)``.

    Parameters
    ----------
    channels : int
        C, of input and output (B, C, H, W).
    num_heads : int
        Each head has ``d = C / num_heads`` channels.
    num_groups, norm_eps
        Of the group normalization.

    References
    ----------
    Ho et al. 2020 (DDPM), appendix B.
    """

    def __init__(self, channels: int, num_heads: int, num_groups: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = GroupNormSiLU(num_groups, channels, norm_eps, activation="identity")
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A Sequential of one so that the parameter is called to_out.0, as in diffusers.
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height_width = x.shape[2:]
        # (B, HW, C): a view, not a copy, when x is channels_last.
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            linear(h).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.to_out(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, height_width)
