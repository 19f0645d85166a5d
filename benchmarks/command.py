"""What `python -m benchmarks` does: choose cases, check, time, print, write.

Exit code 0; 1 if a result was wrong (peers excepted) or, with --compare, something became slower.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import fastdiff
from benchmarks import (
    bench_ddim_step,
    bench_eps_loss,
    bench_group_norm_silu,
    bench_posterior_mean,
    bench_q_sample,
    bench_vlb_terms,
    compare,
    end_to_end,
    machine,
    page,
    report,
    shapes,
    targets,
)
from benchmarks.op_table import Case, Op
from benchmarks.suite import COPIES, GRAPH, OURS, Record, run, with_backends

FORMAT = 1
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        bench_q_sample.OP,
        bench_eps_loss.OP,
        bench_posterior_mean.OP,
        bench_ddim_step.OP,
        bench_vlb_terms.OP,
        bench_group_norm_silu.OP,
    )
}
FILES = ("--json", "--compare", "--out")
COMPILE = ("none", "few", "all")
ROUNDS, QUICK_ROUNDS = 9, 5
SECONDS, QUICK_SECONDS = 0.5, 0.3  # per workload, after three rounds


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="fastdiff against eager PyTorch, torch.compile and installed peers",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {', '.join(OPS)}")
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few shapes and rounds: minutes")
    size.add_argument("--all", action="store_true", help="every shape: an hour")
    made.add_argument("--device", choices=("cpu", "cuda"), default=default)
    made.add_argument("--threads", type=int, help="intra-op threads (default: torch's)")
    made.add_argument("--rounds", type=int, help=f"default {ROUNDS}, quick {QUICK_ROUNDS}")
    made.add_argument("--shapes", nargs="+", metavar="WORD", help="shapes with one of these inside")
    made.add_argument("--modes", nargs="+", metavar="WORD", help="modes with one of these inside")
    for name, choices in (("dtypes", shapes.DTYPES), ("layouts", shapes.LAYOUTS)):
        made.add_argument(f"--{name}", nargs="+", choices=tuple(choices))
    made.add_argument(
        "--compile",
        choices=COMPILE,
        default="few",
        help="torch.compile: of no case, of a few shapes in fp32 nchw (the default), of all",
    )
    made.add_argument(
        "--backends", action="store_true", help="every available backend (always with --all)"
    )
    made.add_argument("--end-to-end", action="store_true", help="training steps and sampling too")
    made.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the numbers here")
    made.add_argument("--compare", type=pathlib.Path, metavar="OLD", help="an earlier --json")
    made.add_argument("--out", type=pathlib.Path, metavar="DIR", help="JSON, plots and report.md")
    made.add_argument(
        "--publish", action="store_true", help="benchmarks/results/ and docs/performance.md"
    )
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser()
    options = made.parse_args(argv)
    options.arguments = without_files(list(sys.argv[1:] if argv is None else argv))
    unknown = [name for name in options.ops if name not in OPS]
    if unknown:
        made.error(f"unknown op {unknown[0]!r}; the ops are {', '.join(OPS)}")
    for option in ("rounds", "threads"):
        value = getattr(options, option)
        if value is not None and value < 1:
            made.error(f"--{option} is {value}, expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device is cuda, but no CUDA device is visible")
    if options.publish and options.device == "cuda" and machine.is_software(options.device):
        made.error(f"--publish: the times are {machine.NO_GPU}")
    if options.compare and not options.compare.is_file():
        made.error(f"--compare: there is no file {options.compare}")
    options.ops = options.ops or list(OPS)
    options.dtypes = options.dtypes or ["fp32", "bf16"]
    options.layouts = options.layouts or (["nchw"] if options.quick else list(shapes.LAYOUTS))
    if not any(True for name in options.ops for _ in cases(OPS[name], options)):
        known = sorted({shape for name in options.ops for shape in OPS[name].shapes})
        made.error(f"no case has these --shapes and --modes; the shapes are {', '.join(known)}")
    return options


def without_files(arguments: list[str]) -> list[str]:
    """The part of a command line that decides on the numbers, and names no path."""
    kept = []
    skip = False
    for argument in arguments:
        option = argument.partition("=")[0]
        if not skip and option not in FILES:
            kept.append(argument)
        skip = option in FILES and "=" not in argument
    return kept


def cases(op: Op, options: argparse.Namespace) -> Iterator[Case]:
    default = op.quick_shapes if options.quick else op.default_shapes
    names = op.shapes if options.all or options.shapes else default
    for shape in names:
        if options.shapes and not any(word in shape for word in options.shapes):
            continue
        for dtype in options.dtypes:
            for layout in options.layouts:
                for mode in op.modes:
                    if options.modes and not any(word in mode for word in options.modes):
                        continue
                    labels = {"shape": shape, "dtype": dtype, "layout": layout, "mode": mode}
                    few = shape in op.compiled_shapes and dtype == "fp32" and layout == "nchw"
                    if options.quick:
                        few = few and shape == op.quick_shapes[0] and mode == op.modes[-1]
                    compiled = options.compile == "all" or (options.compile == "few" and few)
                    yield Case(labels, op.shapes[shape], torch.device(options.device), compiled)


def others(op: Op, options: argparse.Namespace) -> list[str]:
    """The columns of ratios."""
    names = ["eager", "compile", *op.peers]
    names += op.cuda_peers if options.device == "cuda" else ()
    if options.all or options.backends:
        names += [f"{OURS} {name}" for name in ("reference", "triton") if fastdiff.backends()[name]]
    if options.device == "cuda":
        names.append(f"{OURS}{GRAPH}")
    return names


def measure_op(op: Op, options: argparse.Namespace) -> list[Record]:
    """Time every case of one op and print its row as soon as it is known."""
    device = torch.device(options.device)
    ratios = others(op, options)
    titles = [*report.LABELS, "us", "IQR", "GB/s", "of copy"]
    titles += ["vs " + name.removeprefix(OURS + " ") for name in ratios]
    widths = {"shape": 27, "layout": 13, "mode": max(map(len, op.modes)), "us": 9, "GB/s": 6}
    print(f"\n{op.name}")
    table = report.Table(titles, widths)
    records = []
    for case in cases(op, options):
        work = op.workload(case)
        work = with_backends(work, device) if options.all or options.backends else work
        with torch.set_grad_enabled(op.grad):
            record = run(
                work,
                device,
                options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
                QUICK_SECONDS if options.quick else SECONDS,
            )
        records.append(record)
        timing, moved = record.timings.get(OURS), record.bandwidth(OURS)
        table.row(
            [*case.labels.values()]
            + [report.number(timing and timing.median * 1e6, 1)]
            + [report.number(timing and 100 * timing.spread, 0, "%")]
            + [report.number(moved and moved / 1e9, 1)]
            + [report.number(record.of_copy())]
            + [report.ratio(record, OURS, name) for name in ratios]
        )
    return records


def measure_overheads(op: Op, options: argparse.Namespace) -> list[Record]:
    """Calls whose arithmetic takes next to no time."""
    rounds = 50 if options.quick else 300
    records = []
    for case in op.tiny_cases(torch.device(options.device)):
        with torch.set_grad_enabled(op.grad):
            # Long samples: the first calls of a few microseconds run with cold caches.
            records.append(run(op.workload(case), case.device, rounds, 1.0, sample_seconds=1e-3))
    return records


def print_overheads(rows: Sequence[report.Row]) -> None:
    names = sorted({name for row in rows for name in row["contenders"]} - set(COPIES))
    print("\nus per call on a tiny tensor")
    widths = dict.fromkeys(names, 9)
    table = report.Table(["op", "mode", *names], {"op": 16, "mode": 15, **widths})
    for row in rows:
        times = (report.seconds(row, name) for name in names)
        table.row([row["op"], row["mode"], *(report.number(t and t * 1e6) for t in times)])


def print_wrong(rows: Sequence[report.Row]) -> bool:
    """Name every suppressed number; whether one of them fails the run."""
    lines, failed = [], False
    for row in rows:
        for name, why in row["wrong"].items():
            excused = name in row["peers_wrong"]
            failed |= not excused
            note = " (a peer: reported, not our failure)" if excused else ""
            lines.append(f"  {row['op']} {report.where(row)}, {name}: {why}{note}")
    if lines:
        print("\nwrong results, hence no number")
        print("\n".join(lines))
    return failed


def slug(facts: dict[str, Any]) -> str:
    """A file name for the machine: its processor and how many threads were used."""
    name = facts.get("gpu") or f"{facts['cpu']} {facts['simd'] or ''} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for."""
    device = torch.device(options.device)
    facts = machine.facts(device)
    facts["copy_gb_s"] = round(machine.copy_bandwidth(device, 5 if options.quick else 9) / 1e9, 2)
    report.print_facts(facts)
    document: dict[str, Any] = {"format": FORMAT, "machine": facts, "ops": [], "overhead": []}
    document["arguments"] = options.arguments
    for name in options.ops:
        document["ops"] += [{"op": name, **r.to_json()} for r in measure_op(OPS[name], options)]
    for name in options.ops:
        found = measure_overheads(OPS[name], options)
        document["overhead"] += [{"op": name, **record.to_json()} for record in found]
    print_overheads(document["overhead"])
    if options.end_to_end:
        document |= end_to_end.collect(options)
    return document


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    document = collect(options)
    failed = print_wrong([row for section in compare.SECTIONS for row in document.get(section, ())])
    print("\ntargets")
    if "times" in document["machine"]:
        print(f"  not judged: times are {document['machine']['times']}")
    else:
        for verdict in targets.verdicts(document):
            print(f"  {verdict}")
    if options.json:
        options.json.write_text(report.to_json(document, indent=1))
    if options.out:
        page.write_folder(document, options.out, slug(document["machine"]))
    if options.publish:
        page.publish(document, slug(document["machine"]))
    if options.compare:
        print(f"\nagainst {options.compare.name}")
        old = json.loads(options.compare.read_text())
        failed |= bool(compare.print_comparison(old, document))
    return int(failed)
