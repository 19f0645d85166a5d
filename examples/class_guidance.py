"""Does guidance give the class that was asked for? Both kinds, on 8x8 digits.

    python examples/class_guidance.py [RUN]

A class-conditional U-Net (unless the folder RUN holds one) and a classifier of noisy digits are
trained. Then
digits of every class are drawn three ways, at guidance scales w = 0, 1, 3:

- classifier-free: uncond + w (cond - uncond); w = 0 is the unconditional model, 1 the conditional,
- classifier, eps form: the unconditional model steered by w times the classifier's gradient, DDIM,
- classifier, mean form: the same gradient as a shift of DDPM's mean.

A support vector machine that took no part in the sampling says which class it sees: printed is the
share of samples in the class asked for. Exits with 1 if a share does not rise with w.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from score_digits import real_digits

import fastdiff
from fastdiff.images import image_grid, to_uint8
from fastdiff.nn import NoisyClassifier, preset_config
from fastdiff.samplers import DDIM, DDPM, Sampler
from fastdiff.training import RunFolder, TrainConfig, TrainedRun, Trainer, load_dataset, load_run
from fastdiff.training.data import Batches

SCALES = (0.0, 1.0, 3.0)


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        default="runs/class_guidance",
        help="run folder of `train --class-cond`, trained if there is none",
    )
    parser.add_argument("--num", type=int, default=200, help="samples per number")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--train-steps", type=int, default=700, help="of the U-Net")
    parser.add_argument("--classifier-steps", type=int, default=400, help="of the classifier")
    parser.add_argument("--picture", help="save a grid: one row per method and scale")
    args = parser.parse_args()
    torch.set_num_threads(1)  # 8x8 images are too small to share

    if not args.run.exists():
        train_unet(args.run, args.train_steps)
    run = load_run(args.run)
    classifier = train_classifier(run.diffusion, args.classifier_steps)
    _, _, judge = real_digits()

    null_class = run.unet.config.num_classes
    y = torch.arange(args.num) % null_class
    null = torch.full_like(y, null_class)
    ddim = DDIM(run.diffusion, args.steps)
    ddpm = DDPM(run.diffusion, args.steps)

    def classifier_free(w: float) -> torch.Tensor:
        return draw(run, ddim, y, fastdiff.ClassifierFree(w, {"y": null}))

    def classifier_eps(w: float) -> torch.Tensor:
        guidance = fastdiff.ClassifierGuidance(classifier, y, w, run.diffusion)
        return draw(run, ddim, null, guidance)

    def classifier_mean(w: float) -> torch.Tensor:
        guidance = fastdiff.ClassifierGuidance(classifier, y, w, run.diffusion, form="mean")
        return draw(run, ddpm, null, guidance)

    print(f"{'share in the class asked for':30}" + "".join(f"{f'w = {w:g}':>8}" for w in SCALES))
    reached, rows = True, []
    for name, method in (
        ("classifier-free, DDIM", classifier_free),
        ("classifier, eps form, DDIM", classifier_eps),
        ("classifier, mean form, DDPM", classifier_mean),
    ):
        shares = []
        for w in SCALES:
            levels = to_uint8(method(w))
            pixels = levels.reshape(args.num, 64).numpy() * (16 / 255)
            shares.append(float((judge.predict(pixels) == y.numpy()).mean()))
            rows.append(levels[:10])
        print(f"{name:30}" + "".join(f"{share:8.3f}" for share in shares), flush=True)
        # Where w = 1 leaves less than 1 % to win, a sample or two decide on the rest.
        reached &= shares[0] < shares[1] and shares[1] <= shares[2] + 0.01
    if args.picture:
        image_grid(torch.cat(rows), columns=10).save(args.picture)
    return 0 if reached else 1


def train_unet(folder: Path, steps: int) -> None:
    """The default digits run with --class-cond."""
    config = TrainConfig(class_cond=True, steps=steps, device="cpu", num_samples=10, ema=0.995)
    run = RunFolder(folder)
    run.create(config)
    Trainer(config, load_dataset("digits"), run, torch.device("cpu")).train()


def train_classifier(diffusion: fastdiff.GaussianDiffusion, steps: int) -> NoisyClassifier:
    """Cross entropy at x_t ~ q(x_t | x0), t uniform, on the digits (CG §4)."""
    torch.manual_seed(0)
    classifier = NoisyClassifier(preset_config("digits"), num_classes=10)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    batches = iter(Batches(load_dataset("digits"), 64, seed=1))
    for step in range(steps):
        images, y = next(batches)
        t = torch.randint(diffusion.num_timesteps, y.shape)
        x_t = diffusion.q_sample(images.permute(0, 3, 1, 2).contiguous(), t, seed=step)
        loss = F.cross_entropy(classifier(x_t, t), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 100 == 99:
            print(f"classifier: step {step + 1}, loss {loss.item():.3f}", file=sys.stderr)
    return classifier.eval().requires_grad_(False)


def draw(
    run: TrainedRun, sampler: Sampler, y: torch.Tensor, guidance: fastdiff.guidance.Guidance
) -> torch.Tensor:
    """One guided sample per entry of y, the same noise for every method and scale."""
    return sampler.sample(
        run.unet,
        (len(y), *run.image_shape),
        seed=0,
        guidance=guidance,
        model_kwargs={"y": y},
        progress=False,
    )


if __name__ == "__main__":
    sys.exit(main())
