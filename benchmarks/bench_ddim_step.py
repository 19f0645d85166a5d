"""ddim_step and ddpm_step against a copy, eager PyTorch, torch.compile and diffusers.

    python -m benchmarks.bench_ddim_step [--device cpu] [--quick] [--json FILE]

Modes: a deterministic DDIM step; the same guided by a second model output; guided with eta = 1,
noise made in the kernel, where the others call `randn_like`; and a DDPM step with learned variance.
GB/s counts the bytes a perfect kernel moves: read x_t and the model's outputs, write x_s.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastdiff
from benchmarks import machine, report
from benchmarks.bench_q_sample import (
    DTYPES,
    GOAL_OF_COPY,
    GOAL_OVERHEAD,
    LAYOUTS,
    OURS,
    OUT_OF_CACHE_BYTES,
    SHAPES,
    T,
    measure_overheads,
    of_copy,
    on_backend,
    parse,
    print_wrong,
    result_bytes,
)
from benchmarks.suite import Contender, Record, Workload, run
from fastdiff import ops, reference
from fastdiff.reference.step_table import StepColumn

MODES = ("step", "guided", "noise", "learned")
GOAL_SPEED_UP = 4.0
SCALE = 3.0
STEPS = 50
TIMESTEP = 500  # of the step that is timed

# Elements per workload that the gate compares with the float64 reference.
CHECKED_ELEMENTS = 1 << 20


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
        self.mode, self.dtype = mode, dtype
        self.learned, self.noisy = mode == "learned", mode in ("noise", "learned")
        if self.learned:
            row, table = TIMESTEP, schedule.ddpm_table(range(T), "learned_range")
        else:
            row = TIMESTEP * STEPS // T
            table = schedule.ddim_table(range(0, T, T // STEPS), float(self.noisy))
        self.table = table.to(device)
        self.row = self.table[row]
        self.step = torch.full(shape[:1], row, device=device)

        def tensor(channels: int) -> Tensor:
            x = torch.randn((shape[0], channels, *shape[2:]), generator=generator)
            return x.clamp(-1, 1).to(device, dtype).to(memory_format=memory_format)

        self.x = tensor(shape[1])
        self.output = tensor(shape[1] * (1 + self.learned))
        self.uncond = tensor(shape[1]) if mode in ("guided", "noise") else None
        self.bytes = 2 * self.x.nbytes + self.output.nbytes
        self.bytes += 0 if self.uncond is None else self.uncond.nbytes

    def call(self) -> Callable[[], Tensor]:
        seed = 0 if self.noisy else None
        arguments = (self.x, self.output, self.step, self.table)
        if self.learned:
            return lambda: ops.ddpm_step(*arguments, learned_range=True, seed=seed)
        uncond = self.uncond
        return lambda: ops.ddim_step(*arguments, uncond=uncond, guidance_scale=SCALE, seed=seed)

    def _expected(self, count: int, noise: Tensor | None) -> Tensor:
        """The first samples in float64."""
        x, output, step = (t[:count].double() for t in (self.x, self.output, self.step))
        arguments = (x, output, step.long(), self.table)
        if self.learned:
            return reference.ddpm_step(*arguments, learned_range=True, noise=noise)
        uncond = None if self.uncond is None else self.uncond[:count].double()
        return reference.ddim_step(*arguments, uncond=uncond, guidance_scale=SCALE, noise=noise)

    def error(self, result: Tensor, peer: bool = False) -> str | None:
        """What is wrong beyond float32 arithmetic and one rounding of the result to its dtype.

        A peer may take 16 roundings to the dtype of all terms added up, and where it draws its own
        noise, that is compared by mean and variance.
        """
        if result.shape != self.x.shape or result.dtype != self.dtype:
            return f"result is {result.dtype} {tuple(result.shape)}"
        count = min(len(self.x), max(2, CHECKED_ELEMENTS // self.x[0].numel()))
        zero = torch.zeros_like(self.x[:count], dtype=torch.float64)
        mean, one = self._expected(count, zero), self._expected(count, zero + 1)
        sigma = one - mean
        actual = result[:count].double()
        c, row = StepColumn, self.row.double()
        # Inputs are at most 1, guided outputs 1 + 2 SCALE.
        largest = 1.0 if self.uncond is None else 1.0 + 2 * SCALE
        x0 = row[c.RECIP_SQRT_ALPHA_BAR] + row[c.NOISE_TO_SIGNAL] * largest
        eps = row[c.RECIP_SQRT_ONE_MINUS_ALPHA_BAR] + row[c.SIGNAL_TO_NOISE] * x0
        size = row[c.COEF_X0] * x0 + row[c.COEF_X_T] + row[c.COEF_EPS] * eps
        size = size.item() + 6 * sigma.max().item()
        limit = 16 * torch.finfo(self.dtype if peer else torch.float32).eps / 2 * size
        if not (peer and self.noisy):
            noise = None
            if self.noisy:
                noise = reference.philox_normal(zero.shape, 0, device=zero.device).double()
                mean = self._expected(count, noise)
            excess = (actual - mean).abs() - torch.finfo(self.dtype).eps * mean.abs()
            worst = excess.max().item()  # compared so that NaN fails
            return None if worst <= limit else f"error {worst:.3g}, expected at most {limit:.3g}"
        residual = (actual - mean) / sigma
        tolerance = 6 * (2 / residual.numel()) ** 0.5 + limit / sigma.min().item()
        if not abs(residual.mean().item()) <= tolerance:
            return f"its noise has mean {residual.mean():.2g}"
        if not abs(residual.square().mean().item() - 1) <= 3 * tolerance:
            return f"its noise has {residual.square().mean():.4f} of the variance"
        return None


def eager_ddim(
    x: Tensor, output: Tensor, uncond: Tensor | None, row: Tensor, noisy: bool
) -> Tensor:
    """What everybody writes, with the coefficients in the tensors' dtype."""
    if uncond is not None:
        output = uncond + SCALE * (output - uncond)
    c = StepColumn
    a, s = row[c.SQRT_ALPHA_BAR], row[c.SQRT_ONE_MINUS_ALPHA_BAR]
    x0 = ((x - s * output) / a).clamp(-1, 1)
    eps = (x - a * x0) / s
    x_s = row[c.COEF_X0] * x0 + row[c.COEF_EPS] * eps
    return x_s + row[c.SIGMA] * torch.randn_like(x) if noisy else x_s


def eager_ddpm(x: Tensor, output: Tensor, row: Tensor) -> Tensor:
    eps, v = output.chunk(2, 1)
    c = StepColumn
    x0 = ((x - row[c.SQRT_ONE_MINUS_ALPHA_BAR] * eps) / row[c.SQRT_ALPHA_BAR]).clamp(-1, 1)
    log_variance = row[c.LOG_VARIANCE] + row[c.LOG_VARIANCE_SLOPE] * v
    mean = row[c.COEF_X0] * x0 + row[c.COEF_X_T] * x
    return mean + (0.5 * log_variance).exp() * torch.randn_like(x)


def eager_call(inputs: Inputs, wrap: Callable = lambda function: function) -> Callable[[], Tensor]:
    row = inputs.row.to(inputs.dtype)
    x, output, uncond, noisy = inputs.x, inputs.output, inputs.uncond, inputs.noisy
    if inputs.learned:
        function = wrap(eager_ddpm)
        return lambda: function(x, output, row)
    function = wrap(eager_ddim)
    return lambda: function(x, output, uncond, row, noisy)


def diffusers_call(inputs: Inputs) -> Callable[[], Tensor]:
    from diffusers import DDIMScheduler, DDPMScheduler

    betas = {"num_train_timesteps": T, "beta_start": 1e-4, "beta_end": 0.02}
    x, output, uncond = inputs.x, inputs.output, inputs.uncond
    if inputs.learned:
        ddpm = DDPMScheduler(**betas, variance_type="learned_range")
        return lambda: ddpm.step(output, TIMESTEP, x, return_dict=False)[0]
    ddim = DDIMScheduler(**betas)
    ddim.set_timesteps(STEPS)
    eta = float(inputs.noisy)

    def step() -> Tensor:
        guided = output if uncond is None else uncond + SCALE * (output - uncond)
        return ddim.step(
            guided, TIMESTEP, x, eta=eta, use_clipped_model_output=True, return_dict=False
        )[0]

    return step


def contenders(inputs: Inputs, compiled: bool) -> Iterator[tuple[str, Contender]]:
    def their_error(result: Tensor) -> str | None:
        return inputs.error(result, peer=True)

    ours = inputs.call()
    yield OURS, Contender(ours, inputs.error)
    if inputs.x.is_cuda and fastdiff.backends()["cuda"] and fastdiff.backends()["triton"]:
        yield f"{OURS} triton", Contender(on_backend("triton", ours), inputs.error)
    yield "eager", Contender(eager_call(inputs), their_error)
    if compiled:
        # Every workload gets the kernel that is compiled for its shape.
        torch.compiler.reset()
        compile_static = torch.compile(dynamic=False, fullgraph=True)
        yield "compile", Contender(eager_call(inputs, compile_static), their_error)
    if importlib.util.find_spec("diffusers") is not None:
        yield "diffusers", Contender(diffusers_call(inputs), their_error)

    source, target = inputs.x, torch.empty_like(inputs.x)

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
        own_bytes=dict.fromkeys(("copy_", "clone"), 2 * inputs.x.nbytes),
    )


def print_goals(records: list[Record], overheads: list[Record]) -> None:
    """The targets of the project, each with the workload that comes closest to missing it."""
    guided = [r for r in records if r.labels["mode"] == "guided"]
    large = [r for r in guided if result_bytes(r) >= OUT_OF_CACHE_BYTES]
    print("\ngoals")
    for text, goal, values in (
        (
            "guided, out of cache: share of copy bandwidth",
            GOAL_OF_COPY,
            [(s, r) for r in large if (s := of_copy(r))],
        ),
        (
            "guided: times faster than diffusers",
            GOAL_SPEED_UP,
            [(s, r) for r in guided if (s := r.speed_up(OURS, "diffusers"))],
        ),
    ):
        if not values:
            print(f"  {text} >= {goal}: not measured")
            continue
        worst, record = min(values, key=lambda pair: pair[0])
        verdict = "met" if worst >= goal else "MISSED"
        where = " ".join(record.labels.values())
        print(f"  {text} >= {goal}: {verdict}, lowest {worst:.2f} ({where})")
    seconds = [r.timings[OURS].best for r in overheads if OURS in r.timings]
    verdict = "met" if seconds and max(seconds) < GOAL_OVERHEAD else "MISSED"
    if seconds:
        print(
            f"  a call on a tiny tensor < {GOAL_OVERHEAD * 1e6:.0f} us: {verdict}, "
            f"highest {max(seconds) * 1e6:.2f} us"
        )


def measure_table(
    options: argparse.Namespace, device: torch.device, rounds: int, max_seconds: float
) -> list[Record]:
    others = ["eager", "compile", "diffusers"]
    others += [f"{OURS} triton"] if device.type == "cuda" else []
    table = report.Table(
        ["shape", "dtype", "layout", "mode", "MiB", "GB/s", "copy_", "of copy"]
        + [f"vs {name}" for name in others],
        widths={"shape": 17, "layout": 13, "mode": 7, "MiB": 6, "GB/s": 6, "copy_": 6},
    )
    records = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            for layout in options.layouts:
                for mode in options.modes:
                    labels = {"shape": shape, "dtype": dtype, "layout": layout, "mode": mode}
                    work = workload(labels, device, options.compile)
                    record = run(work, device, rounds, max_seconds)
                    records.append(record)
                    bandwidths = (record.bandwidth(name) for name in (OURS, "copy_"))
                    table.row(
                        [*labels.values(), report.number(record.bytes / 2**20, 1)]
                        + [report.number(b and b / 1e9, 1) for b in bandwidths]
                        + [report.number(of_copy(record))]
                        + [report.ratio(record, OURS, name) for name in others]
                    )
    return records


def main(argv: list[str] | None = None) -> int:
    """0, or 1 if fastdiff's own result was wrong anywhere."""
    options = parse(argv, "bench_ddim_step", __doc__, MODES)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = machine.facts(device)
    report.print_facts(facts)
    print()
    rounds = options.rounds or (5 if options.quick else 15)
    with torch.no_grad():
        records = measure_table(options, device, rounds, 2.0 if options.quick else 20.0)
        overheads = measure_overheads(device, 50 if options.quick else 500, MODES, workload)
    print_wrong(records + overheads)
    print_goals(records, overheads)
    if options.json:
        report.write_json(options.json, "ddim_step", facts, records + overheads)
    return int(any(OURS in record.wrong for record in records + overheads))


if __name__ == "__main__":
    machine.ensure_steady_allocator()
    sys.exit(main())
