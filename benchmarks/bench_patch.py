"""Networks before and after `fastdiff.patch`.

    python -m benchmarks.bench_patch [--device cpu] [--quick] [--json FILE]

diffusers' networks with random weights: forward, and forward with backward; eager and, with
--compile, under torch.compile. Both copies run interleaved in one process, and nothing is timed
whose outputs differ. Most of the time goes into convolutions, which are the same in both; the share
of the normalizations is what the operator benchmarks measure.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import pathlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastdiff
from benchmarks import machine, report
from benchmarks.suite import Contender, Record, Workload, run

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("forward", "training")
BEFORE, AFTER = "before", "after"


def ddpm_cifar10(channels: int = 64) -> tuple[nn.Module, tuple[int, ...], Callable]:
    """DDPM's CIFAR-10 U-Net (Math §11), half as wide by default."""
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=tuple(channels * k for k in (1, 2, 2, 2)),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_eps=1e-6,
    )
    return unet, (3, 32, 32), lambda m, x: m(x, timestep(x)).sample


def small_sd(channels: int = 64) -> tuple[nn.Module, tuple[int, ...], Callable]:
    """A latent-diffusion U-Net with cross-attention, narrow."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(channels, 2 * channels),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )

    @functools.cache
    def text(device: torch.device, dtype: torch.dtype) -> Tensor:
        made = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(0))
        return made.to(device, dtype)

    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m(x, timestep(x), text(x.device, x.dtype).expand(len(x), -1, -1)).sample

    return unet, (4, 32, 32), call


def vae(channels: int = 32) -> tuple[nn.Module, tuple[int, ...], Callable]:
    """A latent-diffusion autoencoder, narrow."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(channels, 2 * channels, 2 * channels),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    return model, (3, 64, 64), lambda m, x: m(x).sample


def timestep(x: Tensor) -> Tensor:
    """On the device: of a number networks make one on the CPU, which no CUDA graph copies."""
    return torch.full((len(x),), 500, device=x.device)


NETWORKS = {"ddpm_cifar10": ddpm_cifar10, "small_sd": small_sd, "vae": vae}


def workload(
    labels: dict[str, str], batch: int, device: torch.device, compiled: bool, tiny: bool = False
) -> Workload:
    """Two copies of one network, one of them patched."""
    torch.manual_seed(0)
    memory_format, dtype = LAYOUTS[labels["layout"]], DTYPES[labels["dtype"]]
    name = labels["network"]
    network, shape, call = NETWORKS[name](32) if tiny else NETWORKS[name]()
    network = network.to(device, memory_format=memory_format).eval()
    if dtype != torch.float32:
        network = network.to(dtype)
    patched = copy.deepcopy(network)
    left = fastdiff.patch(patched).left
    if left:
        raise RuntimeError(f"{name}: left alone: {left}")
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype, memory_format=memory_format)
    training = labels["mode"] == "training"

    def runner(module: nn.Module) -> Callable[[], Tensor]:
        if compiled:
            module.compile(fullgraph=True, dynamic=False)

        def run_once() -> Tensor:
            with torch.set_grad_enabled(training):
                y = call(module, x)
            if training:
                y.square().mean().backward()
                module.zero_grad()
            return y.detach()

        return run_once

    with torch.no_grad():
        expected = call(network, x).double()
    # A hundred roundings on the way, as large as the result at most.
    limit = 100 * torch.finfo(dtype).eps * expected.abs().max().item()

    def error(result: Tensor) -> str | None:
        difference = (result.double() - expected).abs().max().item()
        return None if difference <= limit else f"differs by {difference:.2g}"

    sides = {BEFORE: network, AFTER: patched}
    contenders = {side: Contender(runner(m), error) for side, m in sides.items()}
    return Workload(labels, x.nbytes + expected.numel() * dtype.itemsize, contenders)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each side")
    parser.add_argument("--seconds", type=float, default=60, help="at most, per row")
    parser.add_argument("--compile", action="store_true", help="time compiled networks as well")
    parser.add_argument("--quick", action="store_true", help="the smallest networks, few rounds")
    parser.add_argument("--json", type=pathlib.Path, help="file for the measurements")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print a table of speed ratios; return 1 if a patched network is wrong."""
    options = parse(argv)
    device = torch.device(options.device)
    facts = machine.facts(device)
    report.print_facts(facts)
    titles = ["network", "layout", "dtype", "mode", "run as", "before ms", "after ms", "speed-up"]
    table = report.Table(titles, widths={"network": 12, "layout": 13, "mode": 8})
    records: list[Record] = []
    networks = ["ddpm_cifar10"] if options.quick else options.networks
    for network in networks:
        for layout in options.layouts:
            for dtype in options.dtypes:
                for mode in options.modes:
                    for compiled in (False, True) if options.compile else (False,):
                        labels = {"network": network, "layout": layout, "dtype": dtype}
                        labels |= {"mode": mode, "run as": "compiled" if compiled else "eager"}
                        work = workload(labels, options.batch, device, compiled, options.quick)
                        rounds = 3 if options.quick else options.rounds
                        record = run(work, device, rounds, options.seconds)
                        records.append(record)
                        seconds = (record.timings.get(side) for side in (BEFORE, AFTER))
                        table.row(
                            [*labels.values()]
                            + [report.number(s and s.median * 1e3, 1) for s in seconds]
                            + [report.ratio(record, AFTER, BEFORE)]
                        )
    if "times" in facts:
        print(f"\nnever slower: not judged, times are {facts['times']}")
    else:
        print_goal(records)
    if options.json:
        report.write_json(options.json, "patch", facts, records)
    return 1 if any(record.wrong for record in records) else 0


def print_goal(records: list[Record]) -> None:
    """Never slower: the lowest ratio, and their geometric mean."""
    gains = [gain for r in records if (gain := r.speed_up(AFTER, BEFORE)) is not None]
    if not gains:
        print("\nnever slower: not measured")
        return
    mean = math.exp(sum(map(math.log, gains)) / len(gains))
    verdict = "met" if min(gains) >= 1 else "MISSED"
    print(f"\nnever slower: {verdict}, lowest {min(gains):.2f}, geometric mean {mean:.2f}")


if __name__ == "__main__":
    sys.exit(main())
