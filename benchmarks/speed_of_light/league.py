"""Other packages' kernels beside the project's own, on one device."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.audit.executed import Launch
from benchmarks.audit.expansion import ISSUE
from benchmarks.roofline import DEVICES
from benchmarks.speed_of_light import model
from benchmarks.speed_of_light.cases import LEAGUE, RIVAL_CASES
from benchmarks.speed_of_light.counts import Row
from benchmarks.speed_of_light.tables import main_launch, table

TEXT = pathlib.Path(__file__).with_name("league.md")
GPU = next(gpu for gpu in DEVICES if gpu.name == "H100")
TITLES = (
    *("batch x channels x side", "layout", "pass", "kernel", "launches", "MB", "regs"),
    *("blocks x warps", "instructions per element", "us PREDICTED", "limit", "of ours"),
)
Shape = tuple[int, int, int]


def seconds(launches: Sequence[Launch], operators: int) -> float:
    """Of a call that also starts so many kernels of torch's own."""
    found = model.predict_call(launches, GPU)
    return sum(p.seconds for p in found) + operators * model.LAUNCH_SECONDS


def contenders(
    document: Mapping[str, Any], rows: Sequence[Row], shape: Shape, layout: str, which: str
) -> Iterator[tuple[str, Sequence[Launch], int]]:
    """(name, launches, operators of torch) of all who were counted in one discipline."""
    batch, channels, side = shape
    for row in rows:
        if (row.op, row.device) != ("group_norm_silu", GPU.name):
            continue
        if not row.shape.endswith(f" {channels}x{side}x{side} b{batch}"):
            continue
        if (row.layout, row.mode) == (layout, which):
            yield f"**fastdiff** ({row.backend})", row.launches, 0
    for arch, case in RIVAL_CASES:
        same = case.shape == (batch, channels, side, side)
        if arch != GPU.arch or not same or (case.layout, case.which) != (layout, which):
            continue
        counted = document["rivals"].get(f"{arch} {case.name}", {})
        if counted.get("launches"):
            launches = [Launch(**fields) for fields in counted["launches"]]
            yield case.rival, launches, counted["operators"]


def _cells(name: str, launches: Sequence[Launch], operators: int, elements: int) -> list[str]:
    launch, longest = main_launch(launches, GPU)
    held = longest.occupancy
    issued = 32 * sum(launch.executed[ISSUE] for launch in launches) / elements
    return [
        name,
        f"{len(launches)}" + (f" + {operators} of torch" if operators else ""),
        f"{sum(launch.moved for launch in launches) / 1e6:.0f}",
        str(launch.registers) + (f" ({launch.spills} spilled)" if launch.spills else ""),
        f"{held.blocks} x {held.warps // held.blocks}",
        f"{issued:.0f}",
        f"{seconds(launches, operators) * 1e6:.1f}",
        longest.limit,
    ]


def render(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The table, fastest first in each discipline, and why who is missing is missing."""
    lines = []
    for shape in LEAGUE:
        elements = shape[0] * shape[1] * shape[2] ** 2
        for layout in ("nchw", "channels_last"):
            for which in ("forward", "backward"):
                found = sorted(
                    contenders(document, rows, shape, layout, which),
                    key=lambda entry: seconds(*entry[1:]),
                )
                ours = [seconds(*entry[1:]) for entry in found if "(cuda)" in entry[0]]
                for entry in found:
                    ratio = f"{seconds(*entry[1:]) / ours[0]:.2f}" if ours else "-"
                    label = ["x".join(map(str, shape)), layout, which]
                    lines.append([*label, *_cells(*entry, elements), ratio])
    reasons = {
        f"* {case.name}: {document['rivals'][key]['reason']}"
        for arch, case in RIVAL_CASES
        if "reason" in document["rivals"].get(key := f"{arch} {case.name}", {})
    }
    return "\n".join([table(TITLES, lines), *sorted(reasons)]) + "\n"
