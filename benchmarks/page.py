"""The pages made from a report's JSON: a report.md beside it, and a part of docs/performance.md.

    python -m benchmarks.page benchmarks/results/NAME.json [--docs]

makes them again without measuring. Reasons for missed targets are written by hand, in
benchmarks/results/notes.md, under a heading with the target's key.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import plots, report, targets
from benchmarks.report import Row, markdown, number
from benchmarks.shapes import NETWORKS
from benchmarks.targets import TARGETS, Verdict

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
NOTES = RESULTS / "notes.md"
PAGE = ROOT / "docs/performance.md"
BEGIN = "<!-- made by `python -m benchmarks.page`: edit benchmarks/results/notes.md instead -->"
END = "<!-- end of the made part -->"
COLUMNS = ("fp32 nchw", "bf16 nchw", "fp32 channels_last", "bf16 channels_last")
NAMED_MISSES = 4
PUBLISH = "python -m benchmarks --threads 2 --end-to-end --publish"
NOTHING = f"No report is published yet: `{PUBLISH}` on a quiet machine writes it here.\n"
GPU_TARGETS = (
    "The targets of the GPU kernels are counted, not timed: bytes in docs/traffic.md, registers "
    "and spills in `benchmarks/audit/kernel_budget.json`. No GPU time is claimed here."
)


def read_notes(path: pathlib.Path = NOTES) -> dict[str, str]:
    """Text by target key.

    Raises
    ------
    ValueError
        A heading is no target's key; the message lists the keys.
    """
    keys = [target.key for target in TARGETS]
    notes: dict[str, str] = {}
    if path.exists():
        for part in ("\n" + path.read_text()).split("\n## ")[1:]:
            key, _, text = part.partition("\n")
            if key.strip() not in keys:
                raise ValueError(
                    f"{path.name} has a note on {key.strip()!r}; the targets are {', '.join(keys)}"
                )
            notes[key.strip()] = text.strip()
    return notes


def _machine(document: Mapping[str, Any]) -> str:
    facts = document["machine"]
    processor = facts.get("gpu") or f"{facts['cpu']}, {facts['simd']}"
    versions = ", ".join(
        f"{name} {facts[name]}" for name in ("torch", "diffusers", "triton") if facts.get(name)
    )
    warning = f"**Times are {facts['times']}.** " if "times" in facts else ""
    return (
        f"{warning}Measured on {processor}, {facts['cores']} cores, {facts['threads']} threads, "
        f"load {facts['load']} at the start; {versions}; kernels built by {facts['compiler']}. "
        f"A copy that no cache holds moves {facts['copy_gb_s']:.1f} GB/s.\n"
    )


def _verdicts(found: list[Verdict]) -> str:
    rows = []
    for verdict in found:
        target = verdict.target
        if verdict.met is None:
            rows.append([target.text, "not measured", "-", "-", "-"])
            continue
        place, value = verdict.worst
        rows.append(
            [
                target.text,
                "met" if verdict.met else "**missed**",
                number(verdict.mean, unit=target.unit),
                f"{value:.2f}{target.unit}: {place}",
                f"{len(verdict.missing)} of {verdict.count}",
            ]
        )
    titles = ["target", "", "geometric mean", "worst", "rows short of it"]
    return markdown(titles, rows)


def _misses(found: list[Verdict], notes: Mapping[str, str]) -> Iterator[str]:
    """What every missed target misses, and why if somebody wrote that down."""
    for verdict in found:
        key = verdict.target.key
        if verdict.met is None or (verdict.met and key not in notes):
            continue
        yield f"\n**{verdict.target.text}.**"
        if verdict.missing:
            worst = verdict.missing[:NAMED_MISSES]
            places = "; ".join(
                f"{place} {value:.2f}{verdict.target.unit}" for place, value in worst
            )
            more = len(verdict.missing) - len(worst)
            yield f"Short of it: {places}{f'; and {more} more' if more else ''}."
        yield notes.get(key, "No reason is written down yet.") + "\n"


# What keeps an op from being faster on a CPU, seen in profiles (benchmarks/results/notes.md).
LIMITS = {
    "q_sample": "noise given: memory; noise from a seed: the arithmetic of the normals",
    "eps_loss": "noise given: memory; noise from a seed: the arithmetic of the normals",
    "posterior_mean": "memory",
    "ddim_step": "memory; with noise the arithmetic of the normals",
    "vlb_terms": "arithmetic: two exponentials and a series an element",
    "group_norm_silu": "large maps: memory; small maps: sums and SiLU; 4x4: the call",
}


def _summary(rows: list[Row]) -> str:
    """A line per op: geometric mean, slowest and fastest of all its rows, for each other."""

    def gains(mine: list[Row], other: str) -> str:
        found = sorted(v for row in mine if (v := _gain(row, other)) is not None)
        if not found:
            return "-"
        mean = report.geometric_mean(found)
        return f"**{mean:.1f}x** ({found[0]:.2f} to {found[-1]:.1f}, {len(found)} rows)"

    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        lines.append([f"`{op}`", *(gains(mine, o) for o in plots.OTHERS), LIMITS.get(op, "")])
    return markdown(["op", *(f"against {n}" for n in plots.OTHERS.values()), "limited by"], lines)


def _gain(row: Row, other: str) -> float | None:
    return None if {other, "fastdiff"} & set(row["wrong"]) else report.speed_up(row, other)


def _cell(row: Row, other: str) -> str:
    """A speed-up, or who of the two differs from float64 by more than its dtype allows."""
    for name, label in ((other, plots.OTHERS[other]), ("fastdiff", "fastdiff")):
        if name in row["wrong"]:
            return f"{label} misses the float64 bound"
    return number(report.speed_up(row, other), unit="x")


def _op_table(rows: list[Row], other: str) -> str:
    """Speed-ups over `other`, a line per shape and mode."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells = lines.setdefault((row["shape"], row["mode"]), {})
        column = f"{row['dtype']} {row['layout']}"
        cells[column] = _cell(row, other)
        if row["dtype"] == "fp32" and row["layout"] == "nchw":
            seconds = report.seconds(row)
            cells["us"] = number(seconds and seconds * 1e6, 1)
            cells["copy"] = number(report.of_copy(row))
    used = [column for column in COLUMNS if any(column in cells for cells in lines.values())]
    titles = ["shape", "mode", *used, "us, fp32 nchw", "its share of copy bandwidth"]
    return markdown(
        titles,
        (
            [*key, *(cells.get(column, "-") for column in (*used, "us", "copy"))]
            for key, cells in lines.items()
        ),
    )


def _ops(document: Mapping[str, Any]) -> Iterator[str]:
    rows = document["ops"]
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        for other, name in plots.OTHERS.items():
            measured = [row for row in mine if report.speed_up(row, other) is not None]
            if measured:
                yield f"\n### `{op}`: times faster than {name}\n"
                yield _op_table(mine if other == "eager" else measured, other)


def _overhead(document: Mapping[str, Any]) -> Iterator[str]:
    rows = document["overhead"]
    if not rows:
        return
    names = ("fastdiff", *(n for n in plots.OTHERS if any(n in r["contenders"] for r in rows)))
    yield "\n### A call on a tiny tensor, in microseconds\n"
    yield markdown(
        ["op", "mode", *names],
        (
            [row["op"], row["mode"]]
            + [number((s := report.seconds(row, n)) and s * 1e6, 1) for n in names]
            for row in rows
        ),
    )


def _end_to_end(document: Mapping[str, Any]) -> Iterator[str]:
    rows = document.get("end_to_end", ())
    if rows:
        yield "\n### Training steps and sampling\n"
        yield "Images per second and, in brackets, peak memory above the network's own in MiB.\n"
        names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
        yield markdown(
            ["what", *names],
            ([f"{row['op']} {report.where(row)}", *(_rate(row, n) for n in names)] for row in rows),
        )
    curves = document.get("growth", ())
    if curves:
        yield "\nSlopes in log-log (1: cost grows in proportion; 2: with the square):\n"
        names = list(dict.fromkeys(name for curve in curves for name in curve["slopes"]))
        yield markdown(
            ["what", "over", "values", *names],
            (
                [f"{c['op']} {c['network']}", c["axis"], " ".join(map(str, c["values"]))]
                + [number(c["slopes"].get(name)) for name in names]
                for c in curves
            ),
        )


def _rate(row: Row, name: str) -> str:
    if name in row["wrong"]:
        return report.WRONG
    seconds = report.seconds(row, name)
    if seconds is None:
        return "-"
    peak = row["peak_bytes"].get(name)
    return f"{row['images'] / seconds:.2f}" + ("" if peak is None else f" ({peak / 2**20:.0f})")


def render(
    document: Mapping[str, Any], notes: Mapping[str, str], pictures: list[str], command: str
) -> str:
    """The page. `pictures` are paths as the page sees them."""
    found = targets.verdicts(document)
    parts = [
        _machine(document),
        f"`{command}`, medians of interleaved repetitions in one process; every contender's result "
        "was compared with float64 before it was timed.\n",
        "\n### How much faster, in one table\n",
        "Geometric mean, and in brackets the slowest and the fastest row. The rows are below.\n",
        _summary(document["ops"]),
        "\n### Targets\n",
        _verdicts(found),
        "" if "gpu" in document["machine"] else GPU_TARGETS,
        *_misses(found, notes),
        *(f"\n![{pathlib.PurePath(p).stem}]({p})\n" for p in pictures),
        *_ops(document),
        *_overhead(document),
        *_end_to_end(document),
        "\nNetworks: " + "; ".join(f"{name}: {text}" for name, text in NETWORKS.items()) + ".\n",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def replace_made_part(page: str, made: str) -> str:
    """`page` with the text between the markers replaced.

    Raises
    ------
    ValueError
        The page does not have both markers.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no part between {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{made}{END}{tail}"


def other_machines(stem: str, folder: pathlib.Path = RESULTS) -> str:
    """Targets of the reports in `folder` not called `stem`: earlier ones of other machines."""
    documents = [
        json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != stem
    ]
    parts = [
        f"{_machine(document)}\n`{command(document)}`\n\n{_verdicts(targets.verdicts(document))}"
        for document in documents
    ]
    return "\n### Earlier, on another machine\n\n" + "\n\n".join(parts) if parts else ""


def docs_page(document: Mapping[str, Any], stem: str, page: str, notes: Mapping[str, str]) -> str:
    """docs/performance.md with the numbers of `document`, whose files are called `stem`."""
    pictures = [
        f"../benchmarks/results/{path.name}" for path in sorted(RESULTS.glob(f"{stem}-*.png"))
    ]
    made = render(document, notes, pictures, command(document)) + other_machines(stem)
    return replace_made_part(page, made)


def command(document: Mapping[str, Any]) -> str:
    """How the numbers were made, without the files that they went to."""
    return "python -m benchmarks " + shlex.join(document["arguments"])


def write_folder(document: Mapping[str, Any], folder: pathlib.Path, stem: str) -> None:
    """JSON, pictures and a page that stands alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(report.to_json(document, indent=1))
    pictures = [path.name for path in plots.write(document, folder, stem)]
    title = "# fastdiff's benchmarks on this machine\n\n"
    text = render(document, read_notes(), pictures, command(document))
    (folder / f"{stem}.md").write_text(title + text)


def publish(document: Mapping[str, Any], stem: str) -> None:
    """The committed report of a machine: JSON, pictures, and the made part of the docs."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(report.to_json(document, separators=(",", ":")))
    plots.write(document, RESULTS, stem)
    PAGE.write_text(docs_page(document, stem, PAGE.read_text(), read_notes()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("json", type=pathlib.Path, help="what --json, --out or --publish wrote")
    parser.add_argument("--docs", action="store_true", help="rewrite docs/performance.md")
    options = parser.parse_args(argv)
    if not options.json.is_file():
        parser.error(f"there is no file {options.json}")
    document, stem = json.loads(options.json.read_text()), options.json.stem
    if options.docs:
        plots.write(document, RESULTS, stem)
        PAGE.write_text(docs_page(document, stem, PAGE.read_text(), read_notes()))
    else:
        sys.stdout.write(render(document, read_notes(), [], command(document)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
