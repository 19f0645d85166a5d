"""A whole step of our trainer against those of the training loops that a user would copy.

    python -m benchmarks.bench_trainer [--presets mnist] [--compile] [--profile] [--json FILE]

From a batch of uint8 images to updated weights and their average: `fastdiff.training.Trainer`; the
loop of diffusers' unconditional example (its images come normalized from the loader, which is left
out here); that of denoising-diffusion-pytorch's Trainer with its own U-Net, as wide as it takes to
have as many weights. diffusers' network starts with our weights. All take Adam or AdamW, clip the
gradient's norm and average the weights, in one process, in turns. Before a contender is timed, its
loss must be that of a network that predicts noise, and its step must have moved the weights and the
average.
"ours" is how many times faster ours is; GFLOP counts convolutions, attention and matrix products,
of which denoising-diffusion-pytorch's network has others than ours.

With --profile: where the time of one step goes, by torch.profiler, which slows small operations.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, report
from benchmarks.networks import BETAS, DIFFUSERS, LUCIDRAINS, T, parameters
from benchmarks.shapes import LAYOUTS
from benchmarks.suite import OURS, Contender, Record, Workload, run
from fastdiff.nn import UNet
from fastdiff.nn.presets import preset_config
from fastdiff.training import RunFolder, TrainConfig, Trainer
from fastdiff.training.data import ArrayDataset

# Images of one step on a CPU, by preset.
BATCHES = {"digits": 64, "mnist": 16, "ddpm_cifar10": 4}
# Self time of these operators is convolution, attention or matrix products.
HEAVY = ("conv", "attention", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn")


@dataclass(frozen=True)
class Loop:
    """One step, which returns the loss, and what it changes."""

    step: Callable[[], Tensor]
    weights: Sequence[Tensor]
    average: Sequence[Tensor]


def images(preset: str, batch: int) -> Tensor:
    """Noise of low contrast: what the pixels are does not change the work."""
    config = preset_config(preset)
    shape = batch, config.sample_size, config.sample_size, config.in_channels
    generator = torch.Generator().manual_seed(0)
    return torch.randint(96, 160, shape, generator=generator, dtype=torch.uint8)


def our_trainer(
    preset: str, pixels: Tensor, layout: str, compiled: bool, device: torch.device
) -> Trainer:
    config = TrainConfig(
        preset=preset,
        schedule="linear",
        batch_size=len(pixels),
        steps=10**6,
        channels_last=layout == "channels_last",
        compile=compiled,
        out=str(pathlib.Path(tempfile.gettempdir()) / "unused"),  # only train() writes
    )
    dataset = ArrayDataset(pixels.numpy(), np.zeros(len(pixels), np.int64), ["all"])
    return Trainer(config, dataset, RunFolder(config.run_folder), device)


def our_loop(trainer: Trainer, pixels: Tensor) -> Loop:
    def step() -> Tensor:
        trainer._train_step(pixels, None)
        rows, _ = trainer.meter.read(trainer.world)  # as at the end of a log interval
        return torch.tensor(rows[0][0])

    return Loop(step, list(trainer.unet.parameters()), list(trainer.emas[0].model.parameters()))


def normalized(pixels: Tensor, layout: str, device: torch.device) -> Tensor:
    x0 = pixels.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x0.contiguous(memory_format=LAYOUTS[layout])


def diffusers_loop(net: nn.Module, x0: Tensor, compiled: bool) -> Loop:
    """The body of examples/unconditional_image_generation/train_unconditional.py."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    scheduler = DDPMScheduler(**BETAS)
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=10**6)
    model = torch.compile(net) if compiled else net

    def step() -> Tensor:
        noise = torch.randn(x0.shape, device=x0.device)
        t = torch.randint(0, T, (len(x0),), device=x0.device).long()
        noisy = scheduler.add_noise(x0, noise, t)
        loss = F.mse_loss(model(noisy, t).sample.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
        return loss.detach()

    return Loop(step, list(net.parameters()), ema.shadow_params)


def lucidrains_unet(unet: UNet) -> nn.Module:
    """Their U-Net with our multipliers, as wide as it takes to have as many weights as ours."""
    from denoising_diffusion_pytorch import Unet

    config = unet.config

    def made(width: int) -> nn.Module:
        return Unet(
            width,
            dim_mults=config.channel_mult,
            channels=config.in_channels,
            dropout=config.dropout,
        )

    # Weights grow with the square of the width, which their groups of normalization want in eights.
    growth = (parameters(unet) / parameters(made(config.channels))) ** 0.5
    return made(8 * round(config.channels * growth / 8))


def lucidrains_loop(net: nn.Module, x0: Tensor, compiled: bool) -> Loop:
    """The body of denoising_diffusion_pytorch.Trainer.train, for noise as the objective."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    diffusion = GaussianDiffusion(
        net,
        image_size=x0.shape[-1],
        timesteps=T,
        objective="pred_noise",
        beta_schedule="linear",
        auto_normalize=False,
    ).to(x0.device)
    ema = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    model = torch.compile(diffusion) if compiled else diffusion

    def step() -> Tensor:
        loss = model(x0)
        total = loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return torch.tensor(total)

    return Loop(step, list(net.parameters()), list(ema.ema_model.model.parameters()))


def contender(loop: Loop, starts_at_zero: bool, peer: bool) -> Contender:
    """A loop and its gate: of a network whose last layer starts at zero the first loss is the
    variance of the noise, 1; and a step moves the weights and their average."""
    before = [[w.detach().clone() for w in part] for part in (loop.weights, loop.average)]

    def error(loss: Tensor) -> str | None:
        value, (least, most) = loss.item(), (0.7, 1.3) if starts_at_zero else (0.0, float("inf"))
        if not least < value < most:
            return f"its loss is {value}"
        for name, old, now in zip(
            ("weights", "average"), before, (loop.weights, loop.average), strict=True
        ):
            if all(map(torch.equal, old, now)):
                return f"its {name} did not move"
            if not all(w.isfinite().all() for w in now):
                return f"its {name} are not finite"
        return None

    return Contender(loop.step, error, peer)


def loops(labels: dict[str, str], batch: int, device: torch.device) -> dict[str, Loop]:
    """Every loop that is installed, for one preset and layout."""
    preset, layout, compiled = labels["network"], labels["layout"], labels["run as"] == "compiled"
    pixels = images(preset, batch)
    x0 = normalized(pixels, layout, device)
    trainer = our_trainer(preset, pixels, layout, compiled, device)
    found = {OURS: our_loop(trainer, pixels)}
    if importlib.util.find_spec("diffusers") is not None:
        from diffusers.utils import logging

        logging.set_verbosity_error()  # it warns at every .to(), for an empty list of modules
        theirs = copy.deepcopy(trainer.unet).to_diffusers().train()
        theirs.to(device, memory_format=LAYOUTS[layout])
        found[DIFFUSERS] = diffusers_loop(theirs, x0, compiled)
    if importlib.util.find_spec("denoising_diffusion_pytorch") is not None:
        theirs = lucidrains_unet(trainer.unet).to(device, memory_format=LAYOUTS[layout])
        found[LUCIDRAINS] = lucidrains_loop(theirs, x0, compiled)
    return found


def workload(labels: dict[str, str], found: dict[str, Loop]) -> Workload:
    contenders = {
        name: contender(loop, starts_at_zero=name != LUCIDRAINS, peer=name != OURS)
        for name, loop in found.items()
    }
    return Workload(labels, 0, contenders)


def gigaflops(step: Callable[[], Any]) -> float:
    """Floating-point operations of a step's convolutions, attention and matrix products / 1e9."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


def profile(step: Callable[[], Any], device: torch.device, steps: int = 3) -> list[tuple]:
    """(kind, operator, milliseconds per step) of self time, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
    times = []
    for event in profiler.key_averages():
        on_device = device.type == "cuda"
        total = event.self_device_time_total if on_device else event.self_cpu_time_total
        kind = "heavy" if any(word in event.key for word in HEAVY) else "rest"
        times.append((kind, event.key, total / steps / 1e3))
    return sorted(times, key=lambda row: -row[2])


def print_profile(name: str, times: list[tuple], longest: int = 8) -> None:
    total = sum(ms for _, _, ms in times)
    rest = [(key, ms) for kind, key, ms in times if kind == "rest"]
    outside = sum(ms for _, ms in rest)
    print(
        f"\n{name}: {total:.1f} ms a step, of which {outside:.1f} ms ({outside / total:.0%}) "
        "outside convolution, attention and matrix products:"
    )
    for key, ms in rest[:longest]:
        print(f"  {ms:8.2f} ms  {key}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_trainer", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--presets", nargs="+", choices=BATCHES, default=["mnist", "ddpm_cifar10"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, help=f"images (default, by preset: {BATCHES})")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each loop")
    parser.add_argument("--seconds", type=float, default=120, help="at most, per row")
    parser.add_argument("--compile", action="store_true", help="time compiled networks as well")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--json", type=pathlib.Path, help="file for the measurements")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print a table of milliseconds and ratios; return 1 if our loop is wrong."""
    options = parse(argv)
    device = torch.device(options.device)
    facts = machine.facts(device)
    report.print_facts(facts)
    titles = [
        "network",
        "batch",
        "layout",
        "run as",
        "contender",
        "ms",
        "IQR",
        "ours",
        "GFLOP",
        "M weights",
    ]
    widths = {"network": 12, "layout": 13, "run as": 8, "contender": 27, "ms": 7, "ours": 6}
    table = report.Table(titles, widths)
    records: list[Record] = []
    profiles = []
    for preset in options.presets:
        batch = options.batch or BATCHES[preset]
        for layout in options.layouts:
            for mode in ("eager", "compiled") if options.compile else ("eager",):
                labels = {"network": preset, "batch": str(batch), "layout": layout, "run as": mode}
                found = loops(labels, batch, device)
                record = run(workload(labels, found), device, options.rounds, options.seconds)
                records.append(record)
                for name, loop in found.items():
                    timing = record.timings.get(name)
                    numbers = (
                        report.number(timing and timing.median * 1e3, 1),
                        report.number(timing and 100 * timing.spread, 0, "%"),
                        report.ratio(record, OURS, name),
                        report.number(gigaflops(loop.step), 1),
                        report.number(sum(w.numel() for w in loop.weights) / 1e6, 1),
                    )
                    table.row([*labels.values(), name, *numbers])
                    if options.profile and mode == "eager" and timing:
                        what = f"{preset} b{batch} {layout}, {name}"
                        profiles.append((what, profile(loop.step, device)))
    for record in records:
        for name, why in record.wrong.items():
            print(f"wrong, hence no number: {name}: {why}")
    for name, times in profiles:
        print_profile(name, times)
    if options.json:
        report.write_json(options.json, "trainer", facts, records)
    return int(any(record.failed() for record in records))


if __name__ == "__main__":
    sys.exit(main())
