"""diffusers' own training loop with our scheduler: one import differs.

python examples/train_diffusers.py --out runs/diffusers-digits
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, UNet2DModel
from sklearn.datasets import load_digits

import fastdiff
from fastdiff.integrations.diffusers import DDPMScheduler  # was: from diffusers import ...


def main() -> float:
    """Train a UNet2DModel on 8x8 digits, save a DDPMPipeline, return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--out", help="folder for the pipeline")
    args = parser.parse_args()

    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    fastdiff.patch(unet)  # optional; its state dict and its files stay diffusers' own
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for step in range(1, args.steps + 1):
        x0 = images[torch.randint(len(images), (args.batch,))]
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (args.batch,))
        x_t = scheduler.add_noise(x0, noise, t)
        loss = F.mse_loss(unet(x_t, t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.4f}")
    if args.out:
        DDPMPipeline(unet.eval(), scheduler).save_pretrained(args.out)
        print(f"saved {args.out}; DDPMPipeline.from_pretrained loads it, without fastdiff too")
    return loss.item()


if __name__ == "__main__":
    main()
