"""q_sample against a copy, eager PyTorch, torch.compile and diffusers.

    python -m benchmarks.bench_q_sample [--device cpu] [--quick] [--json FILE]

Modes: noise given; noise made in the kernel, where the others call `randn_like` first; and uint8
pixels with noise made in the kernel, where the others scale the pixels first. GB/s counts the bytes
a perfect kernel moves: read x0, read the noise if it is given, write x_t.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import pathlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastdiff
from benchmarks import machine, report
from benchmarks.suite import Contender, Record, Workload, run
from fastdiff import ops, reference
from fastdiff.reference.philox import sample_keys

T = 1000
SEED = 0
OURS = "fastdiff"

# The inputs of the published U-Nets (SPEC §11), a latent-diffusion U-Net and the digits model.
SHAPES = {
    "digits b64": (64, 1, 8, 8),
    "ddpm_cifar10 b16": (16, 3, 32, 32),
    "ddpm_cifar10 b128": (128, 3, 32, 32),
    "ddim_celeba64 b64": (64, 3, 64, 64),
    "latent64 b16": (16, 4, 64, 64),
    "latent64 b128": (128, 4, 64, 64),
    "ddpm_256 b16": (16, 3, 256, 256),
    "ddpm_256 b256": (256, 3, 256, 256),
}
QUICK_SHAPES = ("ddpm_cifar10 b128", "ddpm_256 b16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("given", "seed", "uint8")

# A result of this size is larger than the last cache of common machines.
OUT_OF_CACHE_BYTES = 64 << 20
GOAL_OF_COPY, GOAL_SPEED_UP, GOAL_OVERHEAD = 0.8, 4.0, 8e-6

# Elements per workload that the gate compares with the float64 reference.
CHECKED_ELEMENTS = 1 << 21


class Inputs:
    """The tensors of one workload, and what a right result is."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        mode: str,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        schedule = fastdiff.NoiseSchedule.linear(T)
        tables = schedule.tables(device)
        self.a, self.b = tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar
        self.dtype, self.mode = dtype, mode
        self.t = torch.randint(T, shape[:1], generator=generator).to(device)
        if mode == "uint8":
            x0 = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            x0 = (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)
        self.x0 = x0.to(device, memory_format=memory_format)
        self.noise = None
        if mode == "given":
            noise = torch.randn(shape, generator=generator).to(dtype)
            self.noise = noise.to(device, memory_format=memory_format)
        self.picture = self.x0 if mode != "uint8" else self.x0.to(dtype)
        self.bytes = self.x0.nbytes + self.x0.numel() * dtype.itemsize
        self.bytes += 0 if self.noise is None else self.noise.nbytes
        self._prepare_gate()

    def _prepare_gate(self) -> None:
        batch = len(self.x0)
        count = min(batch, max(2, CHECKED_ELEMENTS // self.x0[0].numel()))
        chosen = torch.linspace(0, batch - 1, count).long().to(self.x0.device)
        self._chosen = chosen
        x0, t, a, b = self.x0[chosen], self.t[chosen], self.a.double(), self.b.double()
        self._mean = reference.q_sample(x0, t, a, b, dtype=torch.float64)
        per_sample = (-1, *[1] * (x0.dim() - 1))
        self._std = b[t].reshape(per_sample)
        # Peers build their tables in float32: after t + 1 products alpha_bar is off by as many
        # roundings, and 1 - alpha_bar by the same amount, which is much where it is small.
        rounding = (t.double() + 1).reshape(per_sample) * 2**-24
        self._table_error = rounding / 2 * self._mean.abs()
        self._expected = self._mean
        if self.noise is not None:
            noise = self.noise[chosen]
            self._expected = reference.q_sample(x0, t, a, b, noise, dtype=torch.float64)
        elif self.mode != "given":
            keys = sample_keys(SEED, batch, device=x0.device)[chosen]
            self._expected = reference.q_sample(x0, t, a, b, seed=keys, dtype=torch.float64)
        noise_part = (self._expected - self._mean).abs()
        alpha_bar = 1 - self._std**2
        self._table_error += rounding * alpha_bar / (2 * self._std**2) * noise_part
        self._magnitude = self._mean.abs() + noise_part

    def values_error(self, result: Tensor, own_tables: bool = False) -> str | None:
        """The same values, up to four roundings to the dtype: both products, the sum, the tables.

        own_tables: the contender did not get our tables but built its own in float32.
        """
        if (problem := self._form_error(result)) is not None:
            return problem
        roundoff = torch.finfo(self.dtype).eps / 2
        # Normals differ by up to some ulps of float32 between the generator's implementations.
        limit = (4 * roundoff + 16 * 2**-24) * self._magnitude + torch.finfo(self.dtype).tiny
        limit += own_tables * self._table_error
        excess = (result[self._chosen].double() - self._expected).abs() / limit
        worst = excess.max().item()
        # Written so that NaN fails.
        return None if worst <= 1 else f"error {worst:.3g} times the rounding of its dtype"

    def distribution_error(self, result: Tensor) -> str | None:
        """Noise of the right mean and variance: for contenders that draw their own.

        Sums over n elements of standard deviation s have standard deviations sqrt(sum s^2) and
        sqrt(2 sum s^4); six of them, plus the dtype's rounding of the values themselves.
        """
        if (problem := self._form_error(result)) is not None:
            return problem
        residual = result[self._chosen].double() - self._mean
        variance = (self._std**2).expand_as(residual)
        rounding = 4 * torch.finfo(self.dtype).eps
        mean_error = residual.sum().abs().item()
        mean_limit = 6 * variance.sum().sqrt().item() + rounding * self._mean.abs().sum().item()
        square_error = (residual.square().sum() - variance.sum()).abs().item()
        square_limit = 6 * (2 * variance.square().sum()).sqrt().item()
        square_limit += rounding * (variance.sum() + self._mean.square().sum()).item()
        if not mean_error <= mean_limit:
            return f"its noise has mean {mean_error / residual.numel():.2g}"
        if not square_error <= square_limit:
            return f"its noise has {residual.square().sum() / variance.sum():.4f} of the variance"
        return None

    def _form_error(self, result: Tensor) -> str | None:
        if result.shape != self.x0.shape or result.dtype != self.dtype:
            return f"result is {result.dtype} {tuple(result.shape)}"
        return None


def eager_q_sample(x0: Tensor, t: Tensor, a: Tensor, b: Tensor, noise: Tensor) -> Tensor:
    """What everybody writes. The tables are cast, else half-precision input would give float32."""
    shape = (-1, *[1] * (x0.dim() - 1))
    return a[t].to(x0.dtype).view(shape) * x0 + b[t].to(x0.dtype).view(shape) * noise


def eager_with_noise(x0: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return eager_q_sample(x0, t, a, b, torch.randn_like(x0))


def scaled_pixels(x0: Tensor, dtype: torch.dtype) -> Tensor:
    return x0.to(dtype) / 127.5 - 1


def eager_from_uint8(x0: Tensor, t: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return eager_with_noise(scaled_pixels(x0, dtype), t, a, b)


def eager_call(inputs: Inputs, wrap: Callable = lambda function: function) -> Callable[[], Tensor]:
    x0, t, a, b = inputs.x0, inputs.t, inputs.a, inputs.b
    if inputs.mode == "given":
        function, last = wrap(eager_q_sample), (inputs.noise,)
    elif inputs.mode == "seed":
        function, last = wrap(eager_with_noise), ()
    else:
        function, last = wrap(eager_from_uint8), (inputs.dtype,)
    return lambda: function(x0, t, a, b, *last)


def diffusers_call(inputs: Inputs) -> Callable[[], Tensor]:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=T, beta_start=1e-4, beta_end=0.02)
    x0, t, noise = inputs.x0, inputs.t, inputs.noise
    if inputs.mode == "given":
        return lambda: scheduler.add_noise(x0, noise, t)
    if inputs.mode == "seed":
        return lambda: scheduler.add_noise(x0, torch.randn_like(x0), t)

    def from_uint8() -> Tensor:
        x = scaled_pixels(x0, inputs.dtype)
        return scheduler.add_noise(x, torch.randn_like(x), t)

    return from_uint8


def fastdiff_call(inputs: Inputs) -> Callable[[], Tensor]:
    seed = None if inputs.mode == "given" else SEED
    dtype = inputs.dtype if inputs.mode == "uint8" else None
    x0, t, a, b, noise = inputs.x0, inputs.t, inputs.a, inputs.b, inputs.noise
    return lambda: ops.q_sample(x0, t, a, b, noise, seed=seed, dtype=dtype)


def on_backend(backend: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def forced() -> Tensor:
        with fastdiff.use_backend(backend):
            return call()

    return forced


def contenders(inputs: Inputs, compiled: bool) -> Iterator[tuple[str, Contender]]:
    their_error = inputs.values_error if inputs.mode == "given" else inputs.distribution_error
    ours = fastdiff_call(inputs)
    yield OURS, Contender(ours, inputs.values_error)
    if inputs.x0.is_cuda and fastdiff.backends()["cuda"] and fastdiff.backends()["triton"]:
        yield f"{OURS} triton", Contender(on_backend("triton", ours), inputs.values_error)
    yield "eager", Contender(eager_call(inputs), their_error)
    if compiled:
        # Every workload gets the kernel that is compiled for its shape.
        torch.compiler.reset()
        compile_static = torch.compile(dynamic=False, fullgraph=True)
        yield "compile", Contender(eager_call(inputs, compile_static), their_error)
    if importlib.util.find_spec("diffusers") is not None:
        if inputs.mode == "given":
            their_error = functools.partial(inputs.values_error, own_tables=True)
        yield "diffusers", Contender(diffusers_call(inputs), their_error)

    source = inputs.picture
    target = torch.empty_like(source)

    def copy_error(result: Tensor) -> str | None:
        return None if torch.equal(result, source) else "not a copy"

    yield "copy_", Contender(lambda: target.copy_(source), copy_error)
    yield "clone", Contender(source.clone, copy_error)


def workload(
    labels: dict[str, str], device: torch.device, compiled: bool, tiny: bool = False
) -> Workload:
    shape = (2, 3, 4, 4) if tiny else SHAPES[labels["shape"]]
    inputs = Inputs(
        shape, DTYPES[labels["dtype"]], LAYOUTS[labels["layout"]], labels["mode"], device
    )
    return Workload(
        labels,
        inputs.bytes,
        dict(contenders(inputs, compiled)),
        own_bytes=dict.fromkeys(("copy_", "clone"), 2 * inputs.picture.nbytes),
    )


def of_copy(record: Record) -> float | None:
    """Share of the faster copy's bandwidth."""
    ours = record.bandwidth(OURS)
    copies = [b for name in ("copy_", "clone") if (b := record.bandwidth(name)) is not None]
    return None if ours is None or not copies else ours / max(copies)


def result_bytes(record: Record) -> int:
    return math.prod(SHAPES[record.labels["shape"]]) * DTYPES[record.labels["dtype"]].itemsize


def print_goals(records: list[Record], overheads: list[Record]) -> None:
    """The targets of the project, each with the workload that comes closest to missing it."""
    large = [r for r in records if result_bytes(r) >= OUT_OF_CACHE_BYTES]
    print("\ngoals")
    shares = [(s, r) for r in large if r.labels["mode"] == "given" and (s := of_copy(r))]
    gains = [
        (s, r) for r in records if r.labels["mode"] == "seed" and (s := r.speed_up(OURS, "eager"))
    ]
    for text, goal, values in (
        ("noise given, out of cache: share of copy bandwidth", GOAL_OF_COPY, shares),
        ("noise made in the kernel: times faster than randn_like + eager", GOAL_SPEED_UP, gains),
    ):
        if not values:
            print(f"  {text} >= {goal}: not measured")
            continue
        worst, record = min(values, key=lambda pair: pair[0])
        verdict = "met" if worst >= goal else "MISSED"
        where = " ".join(record.labels.values())
        print(f"  {text} >= {goal}: {verdict}, lowest {worst:.2f} ({where})")
    seconds = [r.timings[OURS].best for r in overheads if OURS in r.timings]
    if seconds:
        verdict = "met" if max(seconds) < GOAL_OVERHEAD else "MISSED"
        print(
            f"  a call on a tiny tensor < {GOAL_OVERHEAD * 1e6:.0f} us: {verdict}, "
            f"highest {max(seconds) * 1e6:.2f} us"
        )


def measure_table(
    options: argparse.Namespace, device: torch.device, rounds: int, max_seconds: float
) -> list[Record]:
    triton = [f"{OURS} triton"] if device.type == "cuda" else []
    table = report.Table(
        ["shape", "dtype", "layout", "mode", "MiB", "GB/s", "copy_", "clone", "of copy"]
        + [f"vs {name}" for name in ("eager", "compile", "diffusers", *triton)],
        widths={"shape": 17, "layout": 13, "mode": 5, "MiB": 6, "GB/s": 6, "clone": 6, "copy_": 6},
    )
    records = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            for layout in options.layouts:
                for mode in options.modes:
                    labels = {"shape": shape, "dtype": dtype, "layout": layout, "mode": mode}
                    record = run(
                        workload(labels, device, options.compile), device, rounds, max_seconds
                    )
                    records.append(record)
                    bandwidths = (record.bandwidth(name) for name in (OURS, "copy_", "clone"))
                    table.row(
                        [*labels.values(), report.number(record.bytes / 2**20, 1)]
                        + [report.number(b and b / 1e9, 1) for b in bandwidths]
                        + [report.number(of_copy(record))]
                        + [
                            report.ratio(record, OURS, name)
                            for name in ("eager", "compile", "diffusers", *triton)
                        ]
                    )
    return records


def measure_overheads(
    device: torch.device,
    rounds: int,
    modes: tuple[str, ...] = MODES,
    workload: Callable[..., Workload] = workload,
) -> list[Record]:
    """Microseconds of a call whose arithmetic takes next to none."""
    names = (OURS, "eager", "diffusers", "clone")
    print("\nus per call on a tensor of 96 elements")
    table = report.Table(["mode", *names], widths={"mode": 17, **dict.fromkeys(names, 9)})
    records = []
    for mode in modes:
        labels = {"shape": "tiny", "dtype": "fp32", "layout": "nchw", "mode": mode}
        tiny = workload(labels, device, compiled=False, tiny=True)
        # Long samples: the first calls of a few microseconds run with cold caches.
        record = run(tiny, device, rounds, sample_seconds=2e-3)
        records.append(record)
        times = (record.timings.get(name) for name in names)
        table.row([mode, *(report.number(time and time.best * 1e6) for time in times)])
    return records


def print_wrong(records: list[Record]) -> None:
    lines = [
        f"  {name}, {' '.join(record.labels.values())}: {why}"
        for record in records
        for name, why in record.wrong.items()
    ]
    if lines:
        print("\nwrong results, hence no ratio")
        print("\n".join(lines))


def parse(
    argv: list[str] | None,
    module: str = "bench_q_sample",
    description: str = __doc__,
    modes: tuple[str, ...] = MODES,
) -> argparse.Namespace:
    """The options that the benchmarks of elementwise ops share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=description.partition("\n")[0]
    )
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is)")
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds: a minute")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--threads", type=int, help="intra-op threads (default: torch's)")
    parser.add_argument("--rounds", type=int, help="samples per contender (default 15, quick 5)")
    for name, choices in (
        ("shapes", tuple(SHAPES)),
        ("dtypes", tuple(DTYPES)),
        ("layouts", tuple(LAYOUTS)),
        ("modes", modes),
    ):
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, help=f"only these of: {', '.join(choices)}"
        )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    options = parser.parse_args(argv)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}, expected at least 1")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device is {options.device!r}, expected cpu or cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but no CUDA device is visible")
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else tuple(SHAPES))
    options.dtypes = options.dtypes or (("fp32", "bf16") if options.quick else tuple(DTYPES))
    options.layouts = options.layouts or (("nchw",) if options.quick else tuple(LAYOUTS))
    options.modes = options.modes or modes
    return options


def main(argv: list[str] | None = None) -> int:
    """0, or 1 if fastdiff's own result was wrong anywhere."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = machine.facts(device)
    report.print_facts(facts)
    print()
    rounds = options.rounds or (5 if options.quick else 15)
    with torch.no_grad():
        records = measure_table(options, device, rounds, 2.0 if options.quick else 20.0)
        overheads = measure_overheads(device, 50 if options.quick else 500)
    print_wrong(records + overheads)
    print_goals(records, overheads)
    if options.json:
        report.write_json(options.json, "q_sample", facts, records + overheads)
    return int(any(OURS in record.wrong for record in records + overheads))


if __name__ == "__main__":
    machine.ensure_steady_allocator()
    sys.exit(main())
