"""Named U-Net configurations: the published ones of Math §11, and small ones."""

from __future__ import annotations

from typing import Any

from fastdiff.nn.config import UNetConfig
from fastdiff.nn.released import RELEASED
from fastdiff.reference.checks import shown

PRESETS: dict[str, UNetConfig] = {
    # Ho et al. 2020, CIFAR-10: 35,746,307 parameters.
    "ddpm_cifar10": UNetConfig(
        sample_size=32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16,), dropout=0.1
    ),
    # Ho et al. 2020, CelebA-HQ and LSUN 256x256: 113,673,219 parameters.
    "ddpm_256": UNetConfig(
        sample_size=256, channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(16,)
    ),
    # Song et al. 2021 (DDIM), CelebA 64x64: 78,700,803 parameters.
    "ddim_celeba64": UNetConfig(
        sample_size=64, channel_mult=(1, 2, 2, 2, 4), attention_resolutions=(16,), dropout=0.1
    ),
    # Nichol & Dhariwal 2021 (IDDPM), CIFAR-10: 52,546,438 parameters.
    "iddpm_cifar10": UNetConfig(
        sample_size=32,
        learned_variance=True,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        num_heads=4,
        dropout=0.3,
        time_embedding="openai",
        time_conditioning="scale_shift",
        downsample_padding="both",
        norm_eps=1e-5,
    ),
    # 28x28 (MNIST, Fashion-MNIST): 28 -> 14 -> 7.
    "mnist": UNetConfig(
        sample_size=28,
        in_channels=1,
        channels=64,
        channel_mult=(1, 2, 2),
        attention_resolutions=(7,),
        dropout=0.1,
    ),
    # The same images on a CPU: 1.2 million parameters and less than a fifth of the time.
    "mnist_small": UNetConfig(
        sample_size=28,
        in_channels=1,
        channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(7,),
        time_conditioning="scale_shift",
        num_groups=8,
    ),
    # Photos on a CPU: 3.3 and 3.4 million parameters, attention at 8x8.
    "small_64": UNetConfig(
        sample_size=64,
        channels=32,
        channel_mult=(1, 2, 2, 4),
        num_res_blocks=1,
        attention_resolutions=(8,),
        time_conditioning="scale_shift",
        num_groups=8,
    ),
    "small_128": UNetConfig(
        sample_size=128,
        channels=32,
        channel_mult=(1, 1, 2, 2, 4),
        num_res_blocks=1,
        attention_resolutions=(8,),
        time_conditioning="scale_shift",
        num_groups=8,
    ),
    # 8x8 handwritten digits, for training in minutes on a laptop's CPU: 16 million multiplications
    # per image, 57 with 64 channels. After 1,000 steps of batch 128 scale_shift reached a loss of
    # 0.0747, additive 0.0777, in the same time.
    "digits": UNetConfig(
        sample_size=8,
        in_channels=1,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        time_conditioning="scale_shift",
        num_groups=8,
    ),
}


def preset_config(name: str, **overrides: Any) -> UNetConfig:
    """The configuration called `name` in PRESETS or RELEASED, with some fields changed.

    Raises
    ------
    ValueError
        The name is unknown (the message lists the known ones), or the overrides do not fit.
    """
    known = PRESETS | RELEASED
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"unknown U-Net preset {shown(name)}; the presets are {', '.join(PRESETS)}; "
            "fastdiff.nn.RELEASED has OpenAI's"
        )
    return known[name].replace(**overrides)
