"""ddim_step and ddpm_step against a copy, eager PyTorch, torch.compile and diffusers.

Modes: a deterministic DDIM step; the same guided by a second model output; guided with eta = 1,
noise made in the kernel, where the others call `randn_like`; and a DDPM step with learned variance.
GB/s counts the bytes a perfect kernel moves: read x_t and the model's outputs, write x_s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastdiff
from benchmarks.op_table import Case, Op
from benchmarks.suite import COPIES, OURS, Contender, Workload, compiled, copies
from fastdiff import ops, reference
from fastdiff.reference.step_columns import StepColumn

T = 1000
MODES = ("step", "guided", "noise", "learned")
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


def contenders(inputs: Inputs, with_compile: bool) -> Iterator[tuple[str, Contender]]:
    def their_error(result: Tensor) -> str | None:
        return inputs.error(result, peer=True)

    yield OURS, Contender(inputs.call(), inputs.error)
    yield "eager", Contender(eager_call(inputs), their_error)
    if with_compile:
        yield "compile", Contender(eager_call(inputs, compiled), their_error)
    if importlib.util.find_spec("diffusers") is not None:
        yield "diffusers", Contender(diffusers_call(inputs), their_error, peer=True)
    yield from copies(inputs.x).items()


def workload(case: Case) -> Workload:
    inputs = Inputs(case.shape, case.dtype, case.memory_format, case.mode, case.device)
    return Workload(
        case.labels,
        inputs.bytes,
        dict(contenders(inputs, case.compiled)),
        own_bytes=dict.fromkeys(COPIES, 2 * inputs.x.nbytes),
    )


OP = Op("ddim_step", MODES, workload, peers=("diffusers",), tiny_modes=MODES, grad=False)
