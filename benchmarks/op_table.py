"""The table of an op's benchmark: shapes x dtypes x layouts x modes, goals, command line."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import machine, report
from benchmarks.bench_q_sample import (
    DTYPES,
    LAYOUTS,
    OURS,
    OUT_OF_CACHE_BYTES,
    QUICK_SHAPES,
    SHAPES,
    on_backend,
    print_wrong,
)
from benchmarks.suite import Contender, Record, Workload, run


@dataclass(frozen=True)
class Spec:
    """One way to call an op on one set of tensors.

    Attributes
    ----------
    ours, eager
        The op, and the same thing in plain PyTorch; what they return is compared with `exact`.
    exact
        The float64 result (or results, flattened into one vector).
    tolerance
        Largest error allowed, relative to the largest exact value.
    bytes
        What a perfect kernel moves.
    largest
        The largest tensor, whose copy gives the machine's bandwidth.
    """

    ours: Callable[[], Tensor]
    eager: Callable[..., Tensor]
    arguments: tuple
    exact: Tensor
    tolerance: float
    bytes: int
    largest: Tensor

    def error(self, result: Tensor) -> str | None:
        """What is wrong with a contender's result. Written so that NaN fails."""
        result, exact = result.double().flatten(), self.exact.double().flatten()
        if result.shape != exact.shape:
            return f"result has {result.numel()} values, expected {exact.numel()}"
        worst = ((result - exact).abs().max() / exact.abs().max()).item()
        return None if worst <= self.tolerance else f"relative error {worst:.3g}"


@dataclass(frozen=True)
class Goal:
    """A target of the project: the least value over the records of these modes."""

    text: str
    least: float
    modes: Sequence[str]
    out_of_cache: bool
    value: Callable[[Record], float | None]


def of_copy(record: Record) -> float | None:
    ours, copy = record.bandwidth(OURS), record.bandwidth("copy_")
    return None if ours is None or copy is None else ours / copy


def over_eager(record: Record) -> float | None:
    return record.speed_up(OURS, "eager")


def workload(spec: Spec, labels: Mapping[str, str], compiled: bool) -> Workload:
    contenders = {OURS: Contender(spec.ours, spec.error)}
    if spec.largest.is_cuda:
        triton = on_backend("triton", spec.ours)
        contenders[f"{OURS} triton"] = Contender(triton, spec.error)
    contenders["eager"] = Contender(lambda: spec.eager(*spec.arguments), spec.error)
    if compiled:
        torch.compiler.reset()
        function = torch.compile(spec.eager, dynamic=False)
        contenders["compile"] = Contender(lambda: function(*spec.arguments), spec.error)
    target = torch.empty_like(spec.largest)
    contenders["copy_"] = Contender(lambda: target.copy_(spec.largest), lambda _: None)
    return Workload(labels, spec.bytes, contenders, {"copy_": 2 * spec.largest.nbytes})


def print_goals(goals: Sequence[Goal], records: Sequence[Record]) -> None:
    print("\ngoals")
    for goal in goals:
        values = [
            (value, record)
            for record in records
            if record.labels["mode"] in goal.modes
            and (not goal.out_of_cache or result_bytes(record) >= OUT_OF_CACHE_BYTES)
            and (value := goal.value(record)) is not None
        ]
        if not values:
            print(f"  {goal.text} >= {goal.least}: not measured")
            continue
        worst, record = min(values, key=lambda pair: pair[0])
        mean = math.exp(sum(math.log(value) for value, _ in values) / len(values))
        verdict = "met" if worst >= goal.least else "MISSED"
        where = " ".join(record.labels.values())
        print(
            f"  {goal.text} >= {goal.least}: {verdict}, lowest {worst:.2f} ({where}), "
            f"geometric mean {mean:.2f}"
        )


def result_bytes(record: Record) -> int:
    return math.prod(SHAPES[record.labels["shape"]]) * DTYPES[record.labels["dtype"]].itemsize


def parse(name: str, doc: str, modes: Sequence[str], argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc.partition("\n")[0]
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds: a minute")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--threads", type=int, help="intra-op threads (default: torch's)")
    parser.add_argument("--rounds", type=int, help="samples per contender (default 15, quick 5)")
    for option, choices in (
        ("shapes", tuple(SHAPES)),
        ("dtypes", tuple(DTYPES)),
        ("layouts", tuple(LAYOUTS)),
        ("modes", tuple(modes)),
    ):
        parser.add_argument(
            f"--{option}", nargs="+", choices=choices, help=f"only these of: {', '.join(choices)}"
        )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    options = parser.parse_args(argv)
    for option in ("rounds", "threads"):
        value = getattr(options, option)
        if value is not None and value < 1:
            parser.error(f"--{option} is {value}, expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but no CUDA device is visible")
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else tuple(SHAPES))
    options.dtypes = options.dtypes or ("fp32", "bf16")
    options.layouts = options.layouts or (("nchw",) if options.quick else tuple(LAYOUTS))
    options.modes = options.modes or tuple(modes)
    return options


def main(
    name: str,
    doc: str,
    modes: Sequence[str],
    specify: Callable[[tuple[int, ...], torch.dtype, torch.memory_format, str, torch.device], Spec],
    goals: Sequence[Goal],
    argv: list[str] | None = None,
) -> int:
    """Measure and print. 0, or 1 if fastdiff's own result was wrong anywhere."""
    options = parse(name, doc, modes, argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = machine.facts(device)
    report.print_facts(facts)
    print()
    rounds = options.rounds or (5 if options.quick else 15)
    others = ["eager", "compile"] + ([f"{OURS} triton"] if device.type == "cuda" else [])
    table = report.Table(
        ["shape", "dtype", "layout", "mode", "MiB", "GB/s", "of copy"]
        + [f"vs {other}" for other in others],
        widths={"shape": 17, "layout": 13, "mode": max(map(len, modes)), "MiB": 6, "GB/s": 6},
    )
    records = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            for layout in options.layouts:
                for mode in options.modes:
                    labels = {"shape": shape, "dtype": dtype, "layout": layout, "mode": mode}
                    spec = specify(SHAPES[shape], DTYPES[dtype], LAYOUTS[layout], mode, device)
                    record = run(
                        workload(spec, labels, options.compile),
                        device,
                        rounds,
                        2.0 if options.quick else 20.0,
                    )
                    records.append(record)
                    bandwidth = record.bandwidth(OURS)
                    table.row(
                        [*labels.values(), report.number(record.bytes / 2**20, 1)]
                        + [report.number(bandwidth and bandwidth / 1e9, 1)]
                        + [report.number(of_copy(record))]
                        + [report.ratio(record, OURS, other) for other in others]
                    )
    print_wrong(records)
    print_goals(goals, records)
    if options.json:
        report.write_json(options.json, name.removeprefix("bench_"), facts, records)
    return int(any(OURS in record.wrong for record in records))
