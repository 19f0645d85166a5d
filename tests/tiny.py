"""The U-Net of tests that run whole commands: 8x8 grey images, no dropout."""

from fastdiff.nn import UNetConfig

TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_groups=4,
)
