"""DDIM sampling on a CPU: the inference form against other runtimes.

    python -m benchmarks.bench_cpu_sampling [--batches 1 2 16] [--threads 1 2] [--dtypes fp32 bf16]

All networks have the same weights and make the same images from the same noise. They take turns in
one process. Beside the wall time of a step is its processor time, that of all threads: on a busy
machine it is what one can compare. Errors are those of one prediction against float64, relative to
its largest value. Peers whose package is not installed are named and left out.
"""

from __future__ import annotations

import argparse
import copy
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from benchmarks import bench_sampling, machine, report, runtimes
from benchmarks.networks import DIFFUSERS, T, awake
from benchmarks.runtimes import ONNXRUNTIME, OPENVINO, Model
from benchmarks.shapes import DTYPES
from benchmarks.suite import OURS

PLAIN, COMPILED, FROZEN = f"{OURS} plain", f"{DIFFUSERS} compiled", f"{DIFFUSERS} frozen"
NAMES = (OURS, PLAIN, DIFFUSERS, COMPILED, FROZEN, OPENVINO, ONNXRUNTIME)
STEPS = 2
# Largest error of a prediction, relative to its largest value: a contender beyond it is wrong.
LIMITS = {"fp32": 1e-4, "bf16": 0.5}


def quartiles(values: list[float]) -> tuple[float, float]:
    """Median, and the distance between the quartiles as a part of it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (high - low) / middle


class Turns:
    """Wall and processor seconds a step of several functions, in rounds of turns."""

    def __init__(self, functions: Mapping[str, Callable[[], Any]], steps: int) -> None:
        self._functions = functions
        self._steps = steps
        self.wall: dict[str, list[float]] = {name: [] for name in functions}
        self.cpu: dict[str, list[float]] = {name: [] for name in functions}

    def run(self, rounds: int) -> None:
        names = list(self._functions)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                wall, cpu = time.perf_counter(), time.process_time()
                self._functions[name]()
                self.wall[name].append((time.perf_counter() - wall) / self._steps)
                self.cpu[name].append((time.process_time() - cpu) / self._steps)


def models(
    unet: fastdiff.UNet, x_T: Tensor, t: Tensor, dtype: torch.dtype, threads: int, names: list[str]
) -> dict[str, Model]:
    """The contenders of a row, those of `names` that compute in `dtype`."""
    plain = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    plain.use_inference_form = False

    def autocast(module: Callable[..., Tensor]) -> Model:
        def call(x: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return module(x, t).float()

        return call

    def theirs() -> nn.Module:
        return unet.to_diffusers().to(memory_format=torch.channels_last)

    made: dict[str, Callable[[], Model]] = {
        OURS: lambda: unet.for_inference(dtype),
        PLAIN: lambda: autocast(plain),
        DIFFUSERS: lambda: autocast(runtimes.Sample(theirs())),
        OPENVINO: lambda: runtimes.openvino(unet.to_diffusers(), x_T, t, threads, dtype),
    }
    if dtype == torch.float32:
        made[COMPILED] = lambda: runtimes.inductor(theirs(), x_T, t, freezing=False)
        made[FROZEN] = lambda: runtimes.inductor(theirs(), x_T, t, freezing=True)
        made[ONNXRUNTIME] = lambda: runtimes.onnxruntime(unet.to_diffusers(), x_T, t, threads)
    return {name: made[name]() for name in names if name in made}


def measure(
    unet: fastdiff.UNet, batch: int, threads: int, dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One batch, number of threads and dtype: a row of JSON, of all contenders."""
    torch.set_num_threads(threads)
    config = unet.config
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(
        batch, config.in_channels, config.sample_size, config.sample_size, generator=generator
    )
    t = torch.randint(T, (batch,), generator=generator)
    exact = copy.deepcopy(unet).double()(x_T.double(), t)
    found = models(unet, x_T, t, DTYPES[dtype], threads, options.contenders)
    errors = {
        name: ((model(x_T, t).double() - exact).abs().max() / exact.abs().max()).item()
        for name, model in found.items()
    }
    wrong = {name: error for name, error in errors.items() if not error <= LIMITS[dtype]}

    def sampling(name: str) -> Callable[[], Tensor]:
        ours = name in (OURS, PLAIN)
        sampler = (bench_sampling.our_sampler if ours else bench_sampling.diffusers_sampler)(STEPS)
        return lambda: sampler(found[name], x_T)

    turns = Turns({name: sampling(name) for name in found if name not in wrong}, STEPS)
    turns.run(1)
    turns = Turns(turns._functions, STEPS)
    turns.run(options.rounds)
    return {
        "preset": options.preset,
        "batch": batch,
        "threads": threads,
        "dtype": dtype,
        "load": round(os.getloadavg()[0], 1),
        "wrong": wrong,
        "contenders": {
            name: {
                "error": errors[name],
                **{
                    f"{clock}_{what}": value
                    for clock, times in (("wall", turns.wall), ("cpu", turns.cpu))
                    for what, value in zip(("s", "spread"), quartiles(times[name]), strict=True)
                },
            }
            for name in turns.wall
        },
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_cpu_sampling", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--preset", choices=fastdiff.nn.PRESETS, default="ddpm_cifar10")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    options = parser.parse_args(argv)
    if OURS not in options.contenders:
        options.contenders.insert(0, OURS)
    if options.rounds < 2:
        parser.error("--rounds: at least 2")
    return options


def main(argv: list[str] | None = None) -> int:
    """Print a table; return 1 if a result of ours was wrong."""
    options = parse(argv)
    for runtime in runtimes.PACKAGES:
        if runtime in options.contenders and (package := runtimes.missing(runtime)) is not None:
            print(f"left out: {runtime} ({package} is not installed)")
            options.contenders.remove(runtime)
    facts = machine.facts(torch.device("cpu"))
    report.print_facts(facts)
    torch.manual_seed(0)
    unet = awake(fastdiff.UNet.from_preset(options.preset, dropout=0.0, learned_variance=False))
    unet = unet.eval().requires_grad_(False)
    print(f"\n{options.preset}: ms for a step of DDIM; how many times faster fastdiff is")
    titles = [
        "batch",
        "threads",
        "dtype",
        "ms",
        "IQR",
        "CPU ms",
        "IQR",
        "error",
        "faster",
        "by CPU",
    ]
    table = report.Table([*titles, "load", "contender"], {"ms": 8, "CPU ms": 8, "error": 8})
    rows = []
    for threads in options.threads:
        for dtype in options.dtypes:
            for batch in options.batches:
                rows.append(row := measure(unet, batch, threads, dtype, options))
                ours = row["contenders"].get(OURS)
                for name, found in row["contenders"].items():
                    table.row(
                        [str(batch), str(threads), dtype]
                        + [report.number(found["wall_s"] * 1e3, 1)]
                        + [report.number(found["wall_spread"] * 100, 0, "%")]
                        + [report.number(found["cpu_s"] * 1e3, 1)]
                        + [
                            report.number(found["cpu_spread"] * 100, 0, "%"),
                            f"{found['error']:.1e}",
                        ]
                        + [
                            report.number(ours and found[f"{clock}_s"] / ours[f"{clock}_s"], 2, "x")
                            for clock in ("wall", "cpu")
                        ]
                        + [str(row["load"]), name]
                    )
                for name, error in row["wrong"].items():
                    print(f"  wrong, hence no time: {name}, error {error:.1e}")
    if options.json:
        options.json.write_text(report.to_json({"machine": facts, "rows": rows}, indent=1))
    return int(any(OURS in row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
