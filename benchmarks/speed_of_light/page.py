"""docs/speed_of_light.md, from the counts."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.audit.expansion import ISSUE
from benchmarks.roofline import DEVICES, Gpu
from benchmarks.speed_of_light import league, model, published
from benchmarks.speed_of_light.counts import COUNTED, Row, rows_of
from benchmarks.speed_of_light.tables import main_launch, table

INTRODUCTION = pathlib.Path(__file__).with_name("introduction.md")


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"


def devices() -> str:
    titles = ("device", "TB/s", "multiprocessors", "GHz", "float32 lanes", "L2 MB", "shared KB")
    titles += ("warps", "blocks", "latency ns", "bytes in flight that 90 % need, KB", "counted as")
    rows = []
    for gpu in DEVICES:
        needed = gpu.bandwidth * model.REACH * gpu.latency / gpu.multiprocessors / 1024
        rows.append(
            (
                gpu.name,
                f"{gpu.bandwidth / 1e12:g}",
                str(gpu.multiprocessors),
                f"{gpu.clock / 1e9:.2f}",
                str(gpu.lanes),
                str(gpu.l2_bytes >> 20),
                str(gpu.shared_bytes >> 10),
                str(gpu.warps),
                str(gpu.blocks),
                f"{gpu.latency * 1e9:.0f}",
                f"{needed:.0f} per multiprocessor",
                COUNTED.get(gpu.name, "sm_90"),
            )
        )
    return table(titles, rows)


TITLES = (
    *("shape", "layout", "pass", "launches", "MB", "regs", "KB shared", "blocks x warps"),
    *("KB in flight / needed", "waves (filled)", "barriers"),
    *("instructions: fma + imad / alu / xu / lsu", "issue slots"),
    *("us: memory / issue / pipe / in flight / chain", "us PREDICTED", "limit", "of bandwidth"),
)


def per_element(executed: Mapping[str, float], elements: float) -> dict[str, float]:
    return {name: 32 * number / elements for name, number in executed.items()}


def cells(row: Row, gpu: Gpu) -> list[str]:
    """Of a table of one device. Columns from "regs" on are those of the longest launch."""
    found = model.predict_call(row.launches, gpu)
    launch, longest = main_launch(row.launches, gpu)
    total = sum(p.seconds for p in found)
    moved = sum(launch.moved for launch in row.launches)
    per = per_element(launch.executed, row.elements)
    limits = {name: seconds * 1e6 for name, seconds in longest.limits.items()}
    pipe = max(("fma", "alu", "xu", "lsu"), key=lambda name: limits[name])
    held = longest.occupancy
    shown = [limits[n] for n in ("memory", "issue", pipe, "in flight", "chain") if n in limits]
    return [
        row.shape,
        row.layout,
        row.mode,
        str(len(row.launches)),
        f"{moved / 1e6:.3g}",
        str(launch.registers) + (f" ({launch.spills} spilled)" if launch.spills else ""),
        f"{launch.shared / 1024:.0f}",
        f"{held.blocks} x {held.warps // held.blocks} ({held.limit})",
        f"{longest.in_flight / 1024:.0f} / {longest.needed / 1024:.0f}",
        f"{longest.waves:.2f} ({longest.fill:.0%})",
        f"{launch.barriers:.0f}",
        f"**{per[ISSUE]:.0f}**: {per.get('fma', 0):.0f} + {per.get('imad', 0):.0f} / "
        f"{per.get('alu', 0):.0f} / {per.get('xu', 0):.1f} / {per.get('lsu', 0):.1f}",
        f"{longest.issue_share:.0%}",
        " / ".join(map(_number, shown[:2])) + f" / {pipe} " + " / ".join(map(_number, shown[2:])),
        f"**{_number(total * 1e6)}**",
        longest.limit,
        f"{moved / gpu.bandwidth / total:.0%}",
    ]


def limits_summary(rows: Sequence[Row]) -> str:
    titles = ("device", "rows", "limits, most frequent first", "worst share of bandwidth, > 16 MB")
    lines = []
    for gpu in DEVICES:
        own = [row for row in rows if row.device == gpu.name]
        if not own:
            continue
        counted = Counter(main_launch(row.launches, gpu)[1].limit for row in own)
        names = ", ".join(f"{name} {number}" for name, number in counted.most_common())
        big = [(_share(row, gpu), row) for row in own if row.launches[0].moved > 16e6]
        share, row = min(big, key=lambda pair: pair[0])
        worst = f"{share:.0%}: {row.op} {row.mode} {row.shape} {row.layout}"
        lines.append((gpu.name, str(len(own)), names, worst))
    return table(titles, lines)


def _share(row: Row, gpu: Gpu) -> float:
    total = sum(p.seconds for p in model.predict_call(row.launches, gpu))
    return sum(launch.moved for launch in row.launches) / gpu.bandwidth / total


def calibration(document: Mapping[str, Any]) -> str:
    found = list(published.comparisons(document))
    if not found:
        return "No measurement's kernels were counted.\n"
    median, mean, worst = published.error(found)
    titles = ("kernel", "device", "us measured", "us PREDICTED", "ratio", "limit", "source")
    rows = []
    for c in found:
        m = c.measurement
        what = m.case.name + ("" if m.launch is None else f", launch {m.launch + 1} alone")
        host = " (waits for Python)" if c.host_bound else ""
        number = m.source.rpartition("/")[2]
        rows.append(
            (
                what,
                m.device,
                f"{m.microseconds:.1f}{host}",
                f"{c.predicted:.1f}",
                f"{c.ratio:.2f}",
                c.limit,
                f"[{number}]({m.source})",
            )
        )
    kept = sum(not c.host_bound for c in found)
    text = (
        f"Of {kept} measurements of device time the model is off by {median:.0%} in the median "
        f"(geometric mean of predicted over measured: {mean:.2f}); worst {worst.ratio:.2f}: "
        f"{worst.measurement.case.name} on {worst.measurement.device}. It is rather too fast than "
        "too slow. No constant was fitted to these rows. Calls below 40 us (80 in backward, "
        "through autograd) may wait for Python between their launches: they are shown, not "
        "counted. Of Liger's backward pass the model leaves out that 128 samples add to the same "
        "addresses by atomics. sglang's two apply kernels have 48 and 43 registers here, which is "
        f"what Nsight Compute showed on the H200 ([23938]({published.APPLY})).\n\n"
    )
    return text + table(titles, rows)


def render(document: Mapping[str, Any]) -> str:
    """The page."""
    rows = rows_of(document)
    errors = sorted(
        launch.static_error
        for row in rows
        for launch in row.launches
        if launch.executed[ISSUE] > 1e5
    )
    low, middle, high = (errors[int(q * (len(errors) - 1))] for q in (0.05, 0.5, 0.95))
    static = f"{middle:.2f} in the median, 90 % of the kernels below lie in {low:.2f} to {high:.2f}"
    parts = [INTRODUCTION.read_text().replace("{static}", static), "\n## Devices\n"]
    parts.append(devices())
    parts.append(
        "\nData sheets, white papers and the CUDA C++ Programming Guide; see "
        "`benchmarks/roofline.py`. A T4 has longer conversions of bfloat16 than the sm_80 code "
        "counted for it.\n\n## What limits\n"
    )
    parts.append(limits_summary(rows))
    parts += ["\n## How far off the model is\n", calibration(document)]
    parts += ["\n## League: GroupNorm of other packages, H100, bfloat16\n"]
    parts += [league.TEXT.read_text(), league.render(document, rows)]
    for gpu in DEVICES:
        own = [row for row in rows if row.device == gpu.name]
        other = [row for row in own if row.op != "group_norm_silu"]
        for backend, title in (("cuda", "CUDA"), ("triton", "Triton")):
            norm = [row for row in own if row not in other and row.backend == backend]
            if norm:
                parts.append(f"\n## {gpu.name}: group_norm_silu, {title}, bfloat16\n")
                parts.append(table(TITLES, [cells(row, gpu) for row in norm]))
        if other:
            parts.append(f"\n## {gpu.name}: elementwise ops, CUDA, bfloat16\n")
            named = [[f"{row.op}, {row.mode}", *cells(row, gpu)] for row in other]
            keep = [[r[0], *r[1:3], *r[4:]] for r in named]
            parts.append(table(("op", *TITLES[:2], *TITLES[3:]), keep))
    return "\n".join(parts)
