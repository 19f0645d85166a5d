"""Small U-Nets that the tests of this room share."""

import torch

from fastdiff.nn import PRESETS, UNet

# Each preset's architecture with two groups of four channels: same blocks, tiny maps.
SMALL = {
    name: preset.replace(
        channels=8,
        num_groups=4,
        sample_size=2 * preset.size_divisor,
        attention_resolutions=[
            2 * preset.size_divisor >> preset.resolutions.index(resolution)
            for resolution in preset.attention_resolutions
        ],
    )
    for name, preset in PRESETS.items()
}


def unzero(unet: UNet, seed: int = 0) -> UNet:
    """Random values for all parameters: a fresh network is zero behind its last convolution."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                is_norm_weight = "norm" in name and name.endswith("weight")
                parameter.copy_(0.1 * noise + (1.0 if is_norm_weight else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return unet


def build(name: str, seed: int = 0, **changes) -> UNet:
    """The small network called `name`, in eval mode, with nothing left at zero."""
    return unzero(UNet(SMALL[name].replace(**changes)), seed).eval()


def inputs(unet: UNet, batch: int = 3, seed: int = 0):
    """x_t, t and, for a class-conditional network, y."""
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    size = config.sample_size
    x_t = torch.randn(batch, config.in_channels, size, size, generator=generator)
    t = torch.randint(1000, (batch,), generator=generator)
    if config.num_classes is None:
        return x_t, t
    return x_t, t, torch.randint(config.num_classes, (batch,), generator=generator)
