"""Bytes that the GPU kernels move, counted without a GPU, and times PREDICTED from them.

    python -m benchmarks.audit.traffic [--quick] [--op group_norm_silu] [--arch sm_80] [--json FILE]
                                 [--all] [--csv FILE] [--plot FILE.png] [--markdown FILE]

The PTX that nvcc and Triton emit runs in the emulator of tests/ptx_emulator, under the unmodified
launchers, which counts every access. MB are accesses to tensors, and what is smaller (tables,
parameters, partial sums) once, as it stays in the caches; "of bound" divides by what a perfect
kernel moves; "accesses" are in sizes of the image or activation; "sectors" are the 32-byte sectors
touched by a warp's accesses, over the fewest that hold its bytes. Of the elementwise ops few
samples are counted and scaled: their blocks share no sample. Of large layers the last blocks of
every launch are counted and scaled ("ran" is their share): all blocks do the same work. Times are
a roofline (benchmarks/roofline.py) of these counts, eager's of PyTorch's kernel sequence:
predictions, never measurements.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import report, roofline
from benchmarks.audit import traffic_page
from benchmarks.audit.traffic_cases import (
    DTYPES,
    IMAGES,
    LAYOUTS,
    Call,
    all_sites,
    chosen_sites,
    group_norm_calls,
    image_calls,
)
from benchmarks.roofline import GPUS, Cost
from benchmarks.shapes import GroupNormSite

BACKENDS = ("cuda", "triton")
ARCHS = ("sm_80", "sm_90")
OPS = ("q_sample", "eps_loss", "ddim_step", "ddpm_step", "vlb_terms", "group_norm_silu")
QUICK_IMAGES = ("ddpm_cifar10",)
DEFAULT_IMAGES = ("digits", "ddpm_cifar10", "latent64", "ddpm_256")
# Of layers with more elements only so many blocks run (whole clusters): a whole one takes minutes.
LARGE, SAMPLED_BLOCKS = 1 << 19, 32


@dataclass(frozen=True)
class Row:
    """Counts of one call, in its whole batch."""

    labels: dict[str, str]
    scale: float
    ran: float  # share of the blocks
    launches: int
    blocks: tuple[int, ...]
    moved: float
    loaded: float
    stored: float
    of_bound: float
    accesses: float
    sectors: float
    predicted: dict[str, float]
    eager_launches: int
    eager_accesses: float
    eager_predicted: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        fields = {k: v for k, v in vars(self).items() if k != "labels"}
        return {**self.labels, **fields}


def moved_by(launch: Any, large: int) -> int:
    from op_harness.traffic import moved_bytes

    return moved_bytes([launch], large)


def count(
    call: Call, backend: str, arch: str, launch_seconds: float, last_blocks: int | None = None
) -> Row:
    """Run one call in the emulator, or of each launch only so many blocks."""
    from op_harness import evaluate
    from op_harness.traffic import sampled

    options = {"arch": arch, "count": True, "racecheck": False, "last_blocks": last_blocks}
    result = evaluate(
        call.op,
        f"{backend}-ptx",
        call.arguments,
        gradients=call.gradients,
        grad_output=call.grad_output,
        **options,
    )
    launches = result.launches[result.forward_launches if call.gradients else 0 :]
    counters = [launch.counters for launch in launches]
    moved = [moved_by(launch, call.tensor_bytes) for launch in launches]
    blocks = [math.prod(launch.grid) for launch in launches]
    scales = [call.scale * sampled(launch) for launch in launches]

    def sectors(which: str) -> float:
        totals = zip(scales, (c.total for c in counters), strict=True)
        return sum(
            scale * (getattr(total.load_requests, which) + getattr(total.store_requests, which))
            for scale, total in totals
        )

    costs = [
        Cost(m * call.scale, c.instructions * scale, max(1, round(b * call.scale)))
        for m, c, b, scale in zip(moved, counters, blocks, scales, strict=True)
    ]
    eager = roofline.eager_launches(call.eager, *call.eager_arguments)
    if call.eager_forward is not None:
        forward = roofline.eager_launches(call.eager_forward, *call.eager_arguments)
        eager = eager[len(forward) :]
    eager = [Cost(cost.bytes * call.scale) for cost in eager]
    tensor = call.tensor_bytes * call.scale
    return Row(
        labels={
            "op": call.op,
            "mode": call.mode,
            **call.labels,
            "backend": backend,
            "arch": arch,
        },
        scale=call.scale,
        ran=sum(launch.blocks for launch in launches) / sum(blocks),
        launches=len(launches),
        blocks=tuple(cost.blocks for cost in costs),
        moved=sum(moved) * call.scale,
        loaded=sum(s * c.global_load_bytes for s, c in zip(scales, counters, strict=True)),
        stored=sum(s * c.global_store_bytes for s, c in zip(scales, counters, strict=True)),
        of_bound=sum(moved) / call.bound,
        accesses=sum(moved) / call.tensor_bytes,
        sectors=sectors("sectors") / max(1.0, sectors("min_sectors")),
        predicted={g.name: roofline.seconds(costs, g, launch_seconds) for g in GPUS},
        eager_launches=len(eager),
        eager_accesses=sum(cost.bytes for cost in eager) / tensor,
        eager_predicted={g.name: roofline.seconds(eager, g, launch_seconds) for g in GPUS},
    )


def sites(options: argparse.Namespace, backend: str) -> list[tuple[GroupNormSite, int]]:
    if not options.all:
        return list(chosen_sites(options.quick))
    if backend == "cuda":
        return list(all_sites())
    # A Triton program's work does not depend on the batch: each layer once.
    return list({site: (site, batch) for site, batch in reversed([*all_sites()])}.values())


def calls(options: argparse.Namespace, arch: str, backend: str) -> Iterator[Call]:
    for dtype in options.dtypes:
        for layout in options.layouts:
            for call in image_calls(dtype, layout, options.images):
                if call.op in options.op:
                    yield call
            if "group_norm_silu" in options.op:
                yield from group_norm_calls(dtype, layout, arch, sites(options, backend))


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for arch in options.arch:
        for backend in options.backend:
            for call in calls(options, arch, backend):
                large = call.op == "group_norm_silu" and call.arguments["x"].numel() > LARGE
                blocks = SAMPLED_BLOCKS if large else None
                yield count(call, backend, arch, options.launch_us * 1e-6, blocks)


TITLES = ("op", "mode", "shape", "dtype", "layout", "backend", "arch", "launches", "blocks")
COUNTS = ("ran", "MB", "of bound", "accesses", "eager's", "sectors")


def cells(row: Row) -> list[str]:
    """The cells of the printed table."""
    times = [
        f"{ours * 1e6:.1f} ({row.eager_predicted[name] / ours:.1f}x)"
        for name, ours in row.predicted.items()
    ]
    return [
        *row.labels.values(),
        str(row.launches),
        "+".join(map(str, row.blocks)),
        f"{row.ran:.2g}",
        f"{row.moved / 1e6:.2f}",
        f"{row.of_bound:.3f}",
        f"{row.accesses:.2f}",
        f"{row.eager_accesses:.1f}",
        f"{row.sectors:.2f}",
        *times,
    ]


def titles() -> list[str]:
    return [*TITLES, *COUNTS, *(f"{g.name} us PREDICTED" for g in GPUS)]


def markdown(found: Sequence[Row]) -> str:
    """The table without what all rows share."""
    table = [titles(), *map(cells, found)]
    keep = [
        i
        for i, title in enumerate(table[0])
        if title not in TITLES[3:7] or len({r[i] for r in table[1:]}) > 1
    ]
    lines = ["| " + " | ".join(row[i] for i in keep) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(keep), *lines[1:]]) + "\n"


def plot(found: Sequence[Row], path: pathlib.Path) -> None:
    """Tensor-sized accesses of ours and eager PyTorch, per op and mode."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    backends = sorted({row.labels["backend"] for row in found})
    groups: dict[str, dict[str, list[float]]] = {}
    for row in found:
        group = groups.setdefault(f"{row.labels['op']}\n{row.labels['mode']}", {})
        group.setdefault(row.labels["backend"], []).append(row.accesses)
        group.setdefault("eager PyTorch", []).append(row.eager_accesses)
        group.setdefault("bound", []).append(row.accesses / row.of_bound)
    bars = ["bound", *backends, "eager PyTorch"]
    figure, axes = pyplot.subplots(figsize=(11, 0.55 * len(groups) + 1.5))
    for k, bar in enumerate(bars):
        means = [sum(g[bar]) / len(g[bar]) if bar in g else 0.0 for g in groups.values()]
        at = [index + (k - len(bars) / 2) * 0.2 for index in range(len(groups))]
        axes.barh(at, means, height=0.19, label=bar)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("memory traffic in tensor sizes (mean over shapes and layouts, counted)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit.traffic", description=__doc__.partition("\n")[0]
    )
    axes = (
        ("op", OPS, OPS, OPS),
        ("backend", BACKENDS, BACKENDS, BACKENDS),
        ("arch", ARCHS, ("sm_90",), ARCHS),
        ("dtypes", tuple(DTYPES), ("bf16",), ("fp32", "bf16")),
        ("layouts", tuple(LAYOUTS), tuple(LAYOUTS), tuple(LAYOUTS)),
        ("images", tuple(IMAGES), DEFAULT_IMAGES, tuple(IMAGES)),
    )
    for option, choices, _default, _all in axes:
        parser.add_argument(f"--{option}", nargs="+", choices=choices)
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, NCHW: two minutes on a cold cache"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every image, layer, batch, architecture and fp32: 1 h",
    )
    parser.add_argument(
        "--launch-us",
        type=float,
        default=roofline.LAUNCH_SECONDS * 1e6,
        help="microseconds that the model gives a launch (default %(default)g)",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw the accesses (PNG)")
    parser.add_argument("--markdown", type=pathlib.Path, metavar="FILE", help="write the table")
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="append the counts")
    options = parser.parse_args(argv)
    for option, _choices, default, everything in axes:
        if getattr(options, option) is None:
            setattr(options, option, everything if options.all else default)
    if options.quick:
        options.images, options.layouts = QUICK_IMAGES, ("nchw",)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from op_harness import available

    for backend in options.backend:
        if (reason := available(f"{backend}-ptx")) is not None:
            print(f"{backend}: {reason}", file=sys.stderr)
            return 2
    torch.manual_seed(0)
    print("Counted in the PTX emulator; microseconds are PREDICTED by a roofline, not measured")
    print("(in brackets: how many times longer the same model gives eager PyTorch).")
    print("; ".join(f"{g.name} {g.bandwidth / 1e12:g} TB/s" for g in GPUS))
    print(f"launch {options.launch_us:g} us")
    table = report.Table(
        titles(),
        widths={"op": 15, "mode": 17, "shape": 29, "layout": 13, "blocks": 11, "MB": 8},
    )
    found = []
    for row in rows(options):
        found.append(row)
        table.row(cells(row))
        if options.csv:
            traffic_page.append(options.csv, row)
    worst = max(found, key=lambda row: row.of_bound)
    print(f"worst: {worst.of_bound:.3f} of the bound, {' '.join(worst.labels.values())}")
    if options.json:
        document = {
            "report": "traffic",
            "predicted": "times are a roofline of counted bytes, not measurements",
            "gpus": [vars(g) for g in GPUS],
            "launch_seconds": options.launch_us * 1e-6,
            "rows": [row.to_json() for row in found],
        }
        options.json.write_text(report.to_json(document, indent=1))
    if options.markdown:
        options.markdown.write_text(markdown(found))
    if options.plot:
        plot(found, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
