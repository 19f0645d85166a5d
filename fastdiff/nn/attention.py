"""Self-attention over the positions of a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.nn.group_norm_silu import GroupNormSiLU
from fastdiff.nn.merging import QKV


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

    def projections(self) -> list[nn.Module]:
        """The maps to queries, keys and values."""
        return [self.to_q, self.to_k, self.to_v]

    def forward(
        self, x: torch.Tensor, qkv: QKV | None = None, normed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend; `qkv` takes the place of `to_q`, `to_k` and `to_v`, `normed` of ``norm(x)``."""
        height_width = x.shape[2:]
        # (B, HW, C): a view, not a copy, when x is channels_last.
        h = (self.group_norm(x) if normed is None else normed).flatten(2).transpose(1, 2)
        if qkv is None:
            parts = [linear(h) for linear in self.projections()]
        else:
            parts = F.linear(h.contiguous(), qkv.weight, qkv.bias).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.to_out(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, height_width)
