"""Neural network modules: the fused GroupNormSiLU and the U-Net with its presets."""

from fastdiff.nn.config import UNetConfig
from fastdiff.nn.group_norm_silu import GroupNormSiLU
from fastdiff.nn.inference import InferenceUNet
from fastdiff.nn.noisy_classifier import NoisyClassifier
from fastdiff.nn.presets import PRESETS, preset_config
from fastdiff.nn.released import RELEASED
from fastdiff.nn.unet import UNet

__all__ = [
    "PRESETS",
    "RELEASED",
    "GroupNormSiLU",
    "InferenceUNet",
    "NoisyClassifier",
    "UNet",
    "UNetConfig",
    "preset_config",
]
