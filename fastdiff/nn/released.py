"""The networks whose weights OpenAI released with IDDPM and with guided-diffusion ("ADM").

Neither repository's checkpoints say how many heads an attention has, nor in which order its
channels are: both are as the flags of the repositories' README pages say.

References: Nichol & Dhariwal 2021 (arXiv 2102.09672); Dhariwal & Nichol 2021 (arXiv 2105.05233).
"""

from __future__ import annotations

import dataclasses

from fastdiff.nn.config import UNetConfig

_OPENAI = UNetConfig(
    sample_size=64,
    learned_variance=True,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(16, 8),
    time_embedding="openai",
    time_conditioning="scale_shift",
    downsample_padding="both",
    norm_eps=1e-5,
)
_ADM = dataclasses.replace(
    _OPENAI,
    channels=256,
    num_res_blocks=2,
    attention_resolutions=(32, 16, 8),
    num_head_channels=64,
    resblock_updown=True,
)
_CLASSIFIER = dataclasses.replace(_ADM, channels=128, learned_variance=False)
_SIX_LEVELS = (1, 1, 2, 2, 4, 4)
_SEVEN_LEVELS = (0.5, 1, 1, 2, 2, 4, 4)

RELEASED: dict[str, UNetConfig] = {
    # improved-diffusion: ImageNet 64x64 without labels and with, LSUN bedroom, and an upsampler,
    # which takes the small image, enlarged, as the estimate of x0.
    "iddpm_imagenet64": dataclasses.replace(_OPENAI, num_heads=4),
    "iddpm_imagenet64_cond": dataclasses.replace(
        _OPENAI, channels=192, num_heads=4, num_classes=1000
    ),
    "iddpm_bedroom256": dataclasses.replace(
        _OPENAI,
        sample_size=256,
        channel_mult=_SIX_LEVELS,
        num_res_blocks=2,
        attention_resolutions=(16,),
        time_conditioning="additive",
    ),
    "iddpm_upsampler256": dataclasses.replace(
        _OPENAI,
        sample_size=256,
        channels=192,
        channel_mult=_SIX_LEVELS,
        num_res_blocks=2,
        num_heads=4,
        num_classes=1000,
        self_conditioning=True,
    ),
    # guided-diffusion: ImageNet by classes; adm_256 without, also for LSUN's bedroom, cat, horse.
    "adm_imagenet64": dataclasses.replace(
        _ADM, channels=192, num_res_blocks=3, dropout=0.1, num_classes=1000
    ),
    "adm_imagenet128": dataclasses.replace(
        _ADM,
        sample_size=128,
        channel_mult=(1, 1, 2, 3, 4),
        num_heads=4,
        num_head_channels=None,
        num_classes=1000,
    ),
    "adm_imagenet256": dataclasses.replace(
        _ADM, sample_size=256, channel_mult=_SIX_LEVELS, num_classes=1000
    ),
    "adm_256": dataclasses.replace(_ADM, sample_size=256, channel_mult=_SIX_LEVELS),
    "adm_imagenet512": dataclasses.replace(
        _ADM, sample_size=512, channel_mult=_SEVEN_LEVELS, num_classes=1000
    ),
    "adm_upsampler256": dataclasses.replace(
        _ADM,
        sample_size=256,
        channels=192,
        channel_mult=_SIX_LEVELS,
        num_heads=4,
        num_head_channels=None,
        num_classes=1000,
        self_conditioning=True,
    ),
    "adm_upsampler512": dataclasses.replace(
        _ADM,
        sample_size=512,
        channels=192,
        channel_mult=_SIX_LEVELS,
        attention_resolutions=(32, 16),
        num_classes=1000,
        self_conditioning=True,
    ),
    # guided-diffusion's classifiers: for fastdiff.nn.NoisyClassifier, with pool="attention".
    "adm_classifier64": dataclasses.replace(_CLASSIFIER, num_res_blocks=4),
    "adm_classifier128": dataclasses.replace(
        _CLASSIFIER, sample_size=128, channel_mult=(1, 1, 2, 3, 4)
    ),
    "adm_classifier256": dataclasses.replace(
        _CLASSIFIER, sample_size=256, channel_mult=_SIX_LEVELS
    ),
    "adm_classifier512": dataclasses.replace(
        _CLASSIFIER, sample_size=512, channel_mult=_SEVEN_LEVELS
    ),
}

NEW_ATTENTION_ORDER = frozenset({"adm_imagenet64"})
"""Those whose attentions have q of all heads first, then k, then v."""


def same_shapes(config: UNetConfig) -> list[str]:
    """The released networks whose tensors have the shapes of those of `config`."""
    return [name for name, released in RELEASED.items() if _shape(released) == _shape(config)]


def _shape(config: UNetConfig) -> tuple:
    levels = [size in config.attention_resolutions for size in config.resolutions]
    return (
        config.widths,
        config.channels,
        levels,
        config.mid_attention,
        config.num_res_blocks,
        config.in_channels * (1 + config.self_conditioning),
        config.out_channels,
        config.num_class_embeddings,
        config.time_conditioning,
        config.conv_resample or config.resblock_updown,
        config.resblock_updown,
    )
