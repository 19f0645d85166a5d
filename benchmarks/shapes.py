"""Shapes that the benchmarks and the traffic report share: the layers of published networks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from fastdiff.nn import GroupNormSiLU, UNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# The networks that the labels of shapes begin with.
NETWORKS = {
    "digits": "the 8x8 digits of `python -m fastdiff.train` (no publication)",
    "ddpm_cifar10": "DDPM, CIFAR-10 32x32: Ho et al. 2020, arXiv 2006.11239",
    "ddpm_256": "DDPM, CelebA-HQ and LSUN 256x256: the same",
    "ddim_celeba64": "DDIM, CelebA 64x64: Song et al. 2021, arXiv 2010.02502",
    "latent64": "latent diffusion, 64x64 latents of 512x512: Rombach et al. 2022, arXiv 2112.10752",
    "vae": "the autoencoder of latent diffusion, 512x512: the same",
}
# The inputs of these networks, by label "network bBATCH".
IMAGE_SHAPES = {
    "digits b64": (64, 1, 8, 8),
    "ddpm_cifar10 b1": (1, 3, 32, 32),
    "ddpm_cifar10 b16": (16, 3, 32, 32),
    "ddpm_cifar10 b128": (128, 3, 32, 32),
    "ddim_celeba64 b64": (64, 3, 64, 64),
    "latent64 b16": (16, 4, 64, 64),
    "latent64 b128": (128, 4, 64, 64),
    "ddpm_256 b16": (16, 3, 256, 256),
    "ddpm_256 b128": (128, 3, 256, 256),
    "ddpm_256 b256": (256, 3, 256, 256),
}
DEFAULT_IMAGES = ("ddpm_cifar10 b128", "ddpm_256 b16", "ddpm_256 b128")
QUICK_IMAGES = ("ddpm_cifar10 b128", "ddpm_256 b16")
TINY_IMAGE = (2, 3, 4, 4)
# A tensor of this size is larger than the last cache of common machines.
OUT_OF_CACHE_BYTES = 48 << 20


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
