"""Discrete diffusion of black-and-white digits (DDIM appendix A, docs/mathematics.md §8).

    python examples/binarized_digits.py --out binarized_digits.png

Trains a U-Net to predict the class, black or white, of every pixel of 8x8 digits whose pixels were
flipped at random, then draws digits from random pixels: the Markov chain's posterior over all
timesteps, and DDIM's posterior (sigma = 1) over 20 of them. Saves rows of real digits, ancestral
samples and DDIM samples, and prints how many of the 64 pixels differ from the nearest of one half
of the real digits, and that one's class; for comparison the other half, and random pixels. Exits
with 1 if samples are further from real digits than real ones are by half, or lack a class.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits

import fastdiff
from fastdiff.images import image_grid
from fastdiff.training import EMA

T = 100


def main() -> int:
    """Train, draw, save, print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="binarized_digits.png", help="picture to write")
    parser.add_argument("--train-steps", type=int, default=700)
    parser.add_argument("--num", type=int, default=200, help="samples per sampler")
    args = parser.parse_args()
    torch.set_num_threads(1)  # 8x8 images are too small to share
    torch.manual_seed(0)

    digits = load_digits()
    x0 = torch.from_numpy((digits.images > 7).astype(np.int64))
    # in_channels = out_channels = number of classes: one-hot in, logits out.
    unet = fastdiff.UNet.from_preset("digits", in_channels=2)
    ancestral = fastdiff.CategoricalDiffusion(fastdiff.NoiseSchedule.cosine(T), 2)
    implicit = fastdiff.CategoricalDiffusion(ancestral.schedule, 2, sigma=1.0)
    model = train(unet, ancestral, x0, args.train_steps)

    shape = (args.num, 8, 8)
    samples = {
        "ancestral, S = 100": ancestral.sample(model, shape, seed=1),
        "DDIM (sigma = 1), S = 20": implicit.sample(model, shape, steps=20, seed=1),
    }
    seen, held_out = np.array_split(np.random.default_rng(0).permutation(len(x0)), 2)
    columns = {
        **samples,
        "real, the other half": x0[held_out[: args.num]],
        "random pixels": torch.randint(2, shape),
    }
    print(f"{'':26}{'pixels off':>12}{'ink':>7}  images of 0..9")
    distances, all_classes = {}, True
    for name, images in columns.items():
        differing = (images.flatten(1)[:, None] != x0[seen].flatten(1)).sum(2)
        nearest, index = differing.min(1)
        distances[name] = float(nearest.float().mean())
        counts = np.bincount(digits.target[seen][index], minlength=10)
        all_classes &= name not in samples or bool(counts.all())
        ink = float(images.float().mean())
        print(f"{name:26}{distances[name]:12.2f}{ink:7.3f}  {' '.join(map(str, counts))}")
    rows = torch.cat([x0[:32], *(images[:32] for images in samples.values())])
    image_grid((rows * 255).to(torch.uint8)[:, None], columns=16).save(args.out)
    close = max(distances[name] for name in samples) <= 1.5 * distances["real, the other half"]
    return 0 if close and all_classes else 1


def train(
    unet: fastdiff.UNet, diffusion: fastdiff.CategoricalDiffusion, x0: torch.Tensor, steps: int
) -> fastdiff.UNet:
    """AdamW on the hybrid loss; returns the averaged weights."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    ema = EMA(unet, 0.99)
    for step in range(steps):
        batch = x0[torch.randint(len(x0), (64,))]
        t = torch.randint(T, (64,))
        loss = diffusion.training_losses(unet, batch, t, seed=step)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        ema.update()
        if step % 100 == 99:
            print(f"step {step + 1}, loss {float(loss.detach()):.4f} nats/pixel", file=sys.stderr)
    return ema.model


if __name__ == "__main__":
    sys.exit(main())
