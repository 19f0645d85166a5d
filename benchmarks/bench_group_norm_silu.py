"""group_norm_silu against eager PyTorch and torch.compile, forward and forward + backward.

    python -m benchmarks.bench_group_norm_silu [--device cpu] [--quick] [--json FILE]

Shapes: every normalization of ddpm_cifar10, ddpm_256 and the digits model, and two of a latent VAE.
The others compute silu(group_norm(x)). GB/s counts the bytes a perfect kernel moves when a group
stays in a cache: forward reads x and writes y; backward reads x and the gradient again and writes
the gradient of x.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import allocator, machine, report
from benchmarks.suite import Contender, Record, Workload, run
from fastdiff import UNet, ops, reference
from fastdiff.nn import GroupNormSiLU

OURS = "fastdiff"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "fwd+bwd")
BATCHES = {"ddpm_cifar10": (1, 16, 128), "ddpm_256": (1, 4), "digits": (1, 64)}
GOAL_EAGER, GOAL_COMPILE = 3.0, 2.0

# Samples of a workload that the gate compares with the float64 reference.
CHECKED_ELEMENTS = 1 << 22


def normalizations(preset: str) -> list[tuple[int, int, int]]:
    """(channels, size, groups) of every normalization behind which SiLU stands, each once."""
    with torch.device("meta"):
        unet = UNet.from_preset(preset)
    found: dict[tuple[int, int, int], None] = {}

    def remember(module: GroupNormSiLU, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        if module.activation == "silu":
            found[x.shape[1], x.shape[2], module.num_groups] = None

    for module in unet.modules():
        if isinstance(module, GroupNormSiLU):
            module.register_forward_pre_hook(remember)
    size, channels = unet.config.sample_size, unet.config.in_channels
    x_t = torch.empty(1, channels, size, size, device="meta")
    unet(x_t, torch.zeros(1, dtype=torch.int64, device="meta"))
    return sorted(found, key=lambda site: (-site[1], site[0]))


def shapes() -> dict[str, tuple[tuple[int, int, int, int], int]]:
    """Name to (shape, groups)."""
    named = {}
    for preset, batches in BATCHES.items():
        for batch in batches:
            for channels, size, groups in normalizations(preset):
                name = f"{preset} b{batch} {channels}x{size}x{size}"
                named[name] = (batch, channels, size, size), groups
    for channels, size in ((512, 64), (128, 512)):
        named[f"vae b1 {channels}x{size}x{size}"] = (1, channels, size, size), 32
    return named


QUICK_SHAPES = (
    "ddpm_cifar10 b1 256x16x16",
    "ddpm_cifar10 b16 128x32x32",
    "ddpm_256 b1 128x128x128",
    "vae b1 512x64x64",
)


class Inputs:
    """The tensors of one workload, and what a right result is."""

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        backward: bool,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        self.groups, self.backward = groups, backward
        self.x = randn(*shape).contiguous(memory_format=memory_format)
        self.grad = randn(*shape).contiguous(memory_format=memory_format)
        self.weight, self.bias = randn(shape[1]), randn(shape[1])
        for tensor in (self.x, self.weight, self.bias):
            tensor.requires_grad_(backward)
        self.bytes = (5 if backward else 2) * self.x.nbytes

    def call(self, function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        x, weight, bias = self.x, self.weight, self.bias

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(x, self.groups, weight, bias),)

        def both() -> tuple[Tensor, ...]:
            y = function(x, self.groups, weight, bias)
            return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), self.grad))

        return both if self.backward else forward

    def error(self, result: tuple[Tensor, ...]) -> str | None:
        """Some samples against float64, in relative norm; sums over the batch only for finiteness.

        Six roundings to the dtype: eager rounds between its steps.
        """
        count = max(1, min(len(self.x), CHECKED_ELEMENTS // self.x[0].numel()))
        x, weight, bias = (
            t.detach().double().requires_grad_() for t in (self.x[:count], self.weight, self.bias)
        )
        expected = [reference.group_norm_silu(x, self.groups, weight, bias)]
        if self.backward:
            grad = self.grad[:count].double()
            expected += torch.autograd.grad(expected[0], (x, weight, bias), grad)
        limit = 6 * torch.finfo(self.x.dtype).eps / 2 + 64 * 2**-24
        whole_batch = count == len(self.x)
        for name, actual, right in zip(
            ("y", "grad_x", "grad_weight", "grad_bias"), result, expected, strict=False
        ):
            if not whole_batch and name in ("grad_weight", "grad_bias"):
                if not actual.isfinite().all():
                    return f"{name} is not finite"
                continue
            actual = actual[:count] if name in ("y", "grad_x") else actual
            worst = ((actual.double() - right).norm() / right.norm()).item()
            if not worst <= limit:  # so that NaN fails
                return f"{name} is off by {worst:.2g}, allowed {limit:.2g}"
        return None


def eager(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias))


def contenders(inputs: Inputs, compiled: bool) -> Iterator[tuple[str, Contender]]:
    yield OURS, Contender(inputs.call(ops.group_norm_silu), inputs.error)
    yield "eager", Contender(inputs.call(eager), inputs.error)
    if compiled:
        # Every workload gets the kernel that is compiled for its shape.
        torch.compiler.reset()
        function = torch.compile(eager, dynamic=False, fullgraph=True)
        yield "compile", Contender(inputs.call(function), inputs.error)


def workload(
    labels: dict[str, str],
    shape: tuple[int, ...],
    groups: int,
    device: torch.device,
    compiled: bool,
) -> Workload:
    inputs = Inputs(
        shape,
        groups,
        DTYPES[labels["dtype"]],
        LAYOUTS[labels["layout"]],
        labels["pass"] != "forward",
        device,
    )
    return Workload(labels, inputs.bytes, dict(contenders(inputs, compiled)))


def print_goals(records: list[Record]) -> None:
    """Geometric means and the workload that comes closest to missing."""
    print("\ngoals")
    for kind in PASSES:
        for other, goal in (("eager", GOAL_EAGER), ("compile", GOAL_COMPILE)):
            gains = [
                (gain, record)
                for record in records
                if record.labels["pass"] == kind and (gain := record.speed_up(OURS, other))
            ]
            if not gains:
                print(f"  {kind} >= {goal}x {other}: not measured")
                continue
            mean = math.exp(sum(math.log(gain) for gain, _ in gains) / len(gains))
            lowest, record = min(gains, key=lambda pair: pair[0])
            verdict = "met" if mean >= goal and lowest >= 1 else "MISSED"
            where = " ".join(record.labels.values())
            print(
                f"  {kind} >= {goal}x {other} in the mean and never slower: {verdict}, mean "
                f"{mean:.2f}x, lowest {lowest:.2f}x ({where}), {len(gains)} workloads"
            )


def parse(argv: list[str] | None, names: tuple[str, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_group_norm_silu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is")
    parser.add_argument("--quick", action="store_true", help="four shapes, few rounds")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--threads", type=int, help="intra-op threads (default: torch's)")
    parser.add_argument("--rounds", type=int, help="samples per contender (default 15, quick 7)")
    parser.add_argument("--shapes", nargs="+", metavar="WORD", help="only shapes with this in them")
    for name, choices in (
        ("dtypes", tuple(DTYPES)),
        ("layouts", tuple(LAYOUTS)),
        ("passes", PASSES),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    options = parser.parse_args(argv)
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but no CUDA device is visible")
    words = options.shapes or (QUICK_SHAPES if options.quick else ("",))
    options.shapes = [name for name in names if any(word in name for word in words)]
    if not options.shapes:
        parser.error(f"no shape has {' or '.join(words)} in its name; there are {', '.join(names)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """0, or 1 if fastdiff's own result was wrong anywhere."""
    named = shapes()
    options = parse(argv, tuple(named))
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    allocator.ensure_steady_allocator()
    facts = machine.facts(device)
    report.print_facts(facts)
    table = report.Table(
        ["shape", "dtype", "layout", "pass", "MiB", "us", "GB/s", "vs eager", "vs compile"],
        widths={"shape": 30, "layout": 13, "pass": 7, "MiB": 7, "us": 9, "GB/s": 6},
    )
    records = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            for layout in options.layouts:
                for kind in options.passes:
                    labels = {"shape": shape, "dtype": dtype, "layout": layout, "pass": kind}
                    work = workload(labels, *named[shape], device, options.compile)
                    rounds = options.rounds or (7 if options.quick else 15)
                    record = run(work, device, rounds, max_seconds=1 if options.quick else 4)
                    records.append(record)
                    timing = record.timings.get(OURS)
                    bandwidth = record.bandwidth(OURS)
                    table.row(
                        [*labels.values(), report.number(record.bytes / 2**20, 1)]
                        + [report.number(timing and timing.median * 1e6, 1)]
                        + [report.number(bandwidth and bandwidth / 1e9, 1)]
                        + [report.ratio(record, OURS, name) for name in ("eager", "compile")]
                    )
    print_goals(records)
    wrong = [(record, *item) for record in records for item in record.wrong.items()]
    for record, name, why in wrong:
        print(f"  wrong: {name}, {' '.join(record.labels.values())}: {why}")
    if options.json:
        report.write_json(options.json, "group_norm_silu", facts, records)
    return int(any(name == OURS for _, name, _ in wrong))


if __name__ == "__main__":
    raise SystemExit(main())
