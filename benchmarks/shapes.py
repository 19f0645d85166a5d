"""Shapes that the benchmarks and the traffic report share: the layers of published networks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from fastdiff.nn import GroupNormSiLU, UNet


@dataclass(frozen=True, order=True)
class GroupNormSite:
    """A group normalization of a network, and how many of its layers are the same.

    `operands` are those of `fastdiff.ops.group_norm_silu` that the layer passes.
    """

    network: str
    channels: int
    height: int
    width: int
    num_groups: int
    operands: tuple[str, ...]
    activation: str
    count: int = 1

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.height, self.width

    def __str__(self) -> str:
        return f"{self.network} {self.channels}x{self.height}x{self.width}"


# The batch sizes at which each network is looked at.
GROUP_NORM_BATCHES = {"ddpm_cifar10": (1, 16, 128), "ddpm_256": (1, 4), "vae": (1,)}
# Decoder of the latent diffusion autoencoder (Rombach et al. 2022, arXiv 2112.10752, f = 8) at
# 512x512: its first and its last resolution.
_VAE = ((512, 64), (128, 512))


def group_norm_sites(network: str) -> list[GroupNormSite]:
    """The group normalizations of "vae" or a `UNet` preset, in the order of their size."""
    if network == "vae":
        return [
            GroupNormSite(network, channels, side, side, 32, ("weight", "bias"), "silu")
            for channels, side in _VAE
        ]
    found: Counter[GroupNormSite] = Counter()

    def record(layer, args, kwargs):
        given = dict(zip(("channel_bias", "scale", "shift"), args[1:], strict=False)) | kwargs
        operands = ["weight", "bias", *(name for name, value in given.items() if value is not None)]
        found[
            GroupNormSite(
                network, *args[0].shape[1:], layer.num_groups, tuple(operands), layer.activation
            )
        ] += 1

    with torch.device("meta"), torch.no_grad():  # shapes only: no memory, no arithmetic
        unet = UNet.from_preset(network).eval()
        for layer in unet.modules():
            if isinstance(layer, GroupNormSiLU):
                layer.register_forward_pre_hook(record, with_kwargs=True)
        size = unet.config.sample_size
        unet(torch.empty(1, unet.config.in_channels, size, size), torch.zeros(1, dtype=torch.int64))
    sites = [GroupNormSite(**{**vars(site), "count": count}) for site, count in found.items()]
    return sorted(sites, key=lambda s: (s.channels * s.height * s.width, s.operands, s.activation))
