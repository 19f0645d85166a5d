"""Classifier-free guidance on someone else's model: a sampler step is one kernel.

    python examples/guided_sampling.py --steps 50 --guidance 3

The model here is a diffusers UNet2DModel with random weights; put yours in its place.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DModel

import fastdiff
from fastdiff import ops


@torch.no_grad()
def sample(
    unet: torch.nn.Module, labels: torch.Tensor, null: int, steps: int, scale: float, seed: int
) -> torch.Tensor:
    """DDIM with guidance ``uncond + scale (cond - uncond)``; images in [-1, 1]."""
    schedule = fastdiff.NoiseSchedule.linear(1000)
    indices = torch.arange(steps) * (1000 // steps)
    table = schedule.ddim_table(indices, eta=0.0, device=labels.device)
    batch, config = len(labels), unet.config
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    x = ops.philox_normal(shape, seed, device=labels.device)
    both = torch.cat([labels, torch.full_like(labels, null)])
    for row in reversed(range(steps)):
        t = indices[row].expand(2 * batch).to(labels.device)
        cond, uncond = unet(torch.cat([x, x]), t, class_labels=both).sample.chunk(2)
        step = torch.full((batch,), row, device=labels.device)
        # Guidance, x0, clipping and the DDIM update, in one pass over four tensors.
        x = ops.ddim_step(x, cond, step, table, uncond=uncond, guidance_scale=scale)
    return x


def main() -> torch.Tensor:
    """Sample one image of each class."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale")
    parser.add_argument("--channels", type=int, default=32, help="width of the network")
    args = parser.parse_args()
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(args.channels, 2 * args.channels),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=11,  # ten digits and "no label"
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    fastdiff.patch(unet)
    images = sample(unet, torch.arange(10), 10, args.steps, args.guidance, seed=0)
    print(f"{tuple(images.shape)}, values {images.min():.2f} to {images.max():.2f}")
    return images


if __name__ == "__main__":
    main()
