"""Other packages' kernels beside the project's own, on one device."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.audit.executed import Launch
from benchmarks.audit.expansion import ISSUE
from benchmarks.roofline import DEVICES, Gpu
from benchmarks.speed_of_light import cases, model
from benchmarks.speed_of_light.counts import Row
from benchmarks.speed_of_light.rivals import Case
from benchmarks.speed_of_light.tables import main_launch, table

TEXT = pathlib.Path(__file__).with_name("league.md")


def _ours(rows: Sequence[Row], shape: tuple[int, int, int], case: Case) -> float | None:
    batch, channels, side = shape
    for row in rows:
        size = f" {channels}x{side}x{side} b{batch}"
        same = row.shape.endswith(size) and row.mode == case.which and row.layout == case.layout
        if same and row.op == "group_norm_silu" and row.device == "H100":
            gpu = next(g for g in DEVICES if g.name == "H100")
            return sum(p.seconds for p in model.predict_call(row.launches, gpu)) * 1e6
    return None


def render(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Rivals and ours on one device, per shape, layout and pass."""
    gpu = next(g for g in DEVICES if g.name == "H100")
    titles = ("shape (batch x channels x side)", "layout", "pass", "kernel", "launches", "MB")
    titles += ("regs", "blocks x warps", "instructions per element", "us PREDICTED", "limit")
    titles += ("of ours",)
    lines, reasons = [], {}
    seen = set()
    for arch, case in cases.RIVAL_CASES:
        shape = (case.shape[0], case.shape[1], case.shape[-1])
        if arch != "sm_90" or shape not in cases.LEAGUE or len(case.shape) != 4:
            continue
        key = (shape, case.layout, case.which)
        ours = _ours(rows, shape, case)
        label = ["x".join(map(str, shape)), case.layout, case.which]
        if key not in seen:
            seen.add(key)
            lines += [[*label, *r] for r in _league_rows(document, rows, shape, case, gpu, ours)]
        counted = document["rivals"].get(f"{arch} {case.name}")
        if counted and "reason" in counted:
            reasons[case.rival, counted["reason"]] = None
    order = {"x".join(map(str, shape)): n for n, shape in enumerate(cases.LEAGUE)}
    lines.sort(key=lambda r: (order[r[0]], r[1] != "nchw", r[2] != "forward", float(r[9])))
    text = table(titles, lines)
    for name, reason in reasons:
        text += f"\n* {name}: {reason}"
    return text + "\n"


def _league_rows(
    document: Mapping[str, Any],
    rows: Sequence[Row],
    shape: tuple[int, int, int],
    like: Case,
    gpu: Gpu,
    ours: float | None,
) -> Iterable[list[str]]:
    elements = shape[0] * shape[1] * shape[2] ** 2
    found: list[tuple[str, Sequence[Launch], int]] = []
    for row in rows:
        size = f" {shape[1]}x{shape[2]}x{shape[2]} b{shape[0]}"
        same = (row.mode, row.layout, row.device) == (like.which, like.layout, gpu.name)
        if same and row.op == "group_norm_silu" and row.shape.endswith(size):
            found.append((f"**fastdiff** ({row.backend})", row.launches, 0))
    for arch, case in cases.RIVAL_CASES:
        counted = document["rivals"].get(f"{arch} {case.name}", {})
        wanted = (case.which, case.layout, case.shape[:2]) == (like.which, like.layout, shape[:2])
        if arch != "sm_90" or not wanted or case.shape[2:] != (shape[2],) * 2:
            continue
        if counted.get("launches"):
            launches = [Launch(**fields) for fields in counted["launches"]]
            found.append((case.rival, launches, counted["operators"]))
    for name, launches, operators in found:
        predicted = model.predict_call(launches, gpu)
        launch, longest = main_launch(launches, gpu)
        total = (sum(p.seconds for p in predicted) + operators * model.LAUNCH_SECONDS) * 1e6
        issued = 32 * sum(launch.executed[ISSUE] for launch in launches) / elements
        held = longest.occupancy
        yield [
            name,
            f"{len(launches)}" + (f" + {operators} of torch" if operators else ""),
            f"{sum(launch.moved for launch in launches) / 1e6:.0f}",
            str(launch.registers) + (f" ({launch.spills} spilled)" if launch.spills else ""),
            f"{held.blocks} x {held.warps // held.blocks}",
            f"{issued:.0f}",
            f"{total:.1f}",
            longest.limit,
            f"{total / ours:.2f}" if ours else "-",
        ]
