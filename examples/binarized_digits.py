"""Discrete diffusion of black-and-white digits (DDIM appendix A, docs/mathematics.md §8).

    python examples/binarized_digits.py --out binarized_digits.png

Trains a U-Net to predict the class, black or white, of every pixel of 8x8 digits whose pixels were
flipped at random, then draws digits from random pixels: the Markov chain's posterior over all
timesteps, and DDIM's posterior (sigma = 1) over 20 of them. Saves rows of real digits, ancestral
samples and DDIM samples, and prints how sure a support vector machine fitted on real binarized
digits is of what it sees (random pixels and held-out real digits beside them).
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import fastdiff
from fastdiff.images import image_grid
from fastdiff.training import EMA

T = 100


def main() -> int:
    """Train, draw, save, print; exit with 1 if the samples are not as sure as 0.7."""
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
    order = np.random.default_rng(0).permutation(len(x0))
    seen, held_out = np.array_split(order, 2)
    judge = CalibratedClassifierCV(SVC(gamma=0.02), ensemble=False)
    judge.fit(x0[seen].flatten(1).numpy(), digits.target[seen])
    columns = {
        **samples,
        "real, held out": x0[held_out[: args.num]],
        "random pixels": torch.randint(2, shape),
    }
    print(f"{'':26}{'confidence':>12}{'ink':>7}  images of 0..9")
    sure = {}
    for name, images in columns.items():
        probabilities = judge.predict_proba(images.flatten(1).numpy())
        sure[name] = probabilities.max(1).mean()
        counts = np.bincount(probabilities.argmax(1), minlength=10)
        print(
            f"{name:26}{sure[name]:12.3f}{images.float().mean():7.3f}  {' '.join(map(str, counts))}"
        )
    rows = torch.cat([x0[:32], *(images[:32] for images in samples.values())])
    image_grid((rows * 255).to(torch.uint8)[:, None], columns=16).save(args.out)
    return 0 if min(sure[name] for name in samples) >= 0.7 else 1


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
