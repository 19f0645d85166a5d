"""q_sample against a copy, eager PyTorch, torch.compile and diffusers.

Modes: noise given; noise made in the kernel, where the others call `randn_like` first; and uint8
pixels with noise made in the kernel, where the others scale the pixels first. GB/s counts the bytes
a perfect kernel moves: read x0, read the noise if it is given, write x_t.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastdiff
from benchmarks.op_table import Case, Op
from benchmarks.suite import COPIES, OURS, Contender, Workload, compiled, copies
from fastdiff import ops, reference
from fastdiff.reference.philox import sample_keys

T = 1000
SEED = 0
MODES = ("given", "seed", "uint8")

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


def contenders(inputs: Inputs, with_compile: bool) -> Iterator[tuple[str, Contender]]:
    their_error = inputs.values_error if inputs.mode == "given" else inputs.distribution_error
    yield OURS, Contender(fastdiff_call(inputs), inputs.values_error)
    yield "eager", Contender(eager_call(inputs), their_error)
    if with_compile:
        yield "compile", Contender(eager_call(inputs, compiled), their_error)
    if importlib.util.find_spec("diffusers") is not None:
        if inputs.mode == "given":
            their_error = functools.partial(inputs.values_error, own_tables=True)
        yield "diffusers", Contender(diffusers_call(inputs), their_error, peer=True)
    yield from copies(inputs.picture).items()


def workload(case: Case) -> Workload:
    inputs = Inputs(case.shape, case.dtype, case.memory_format, case.mode, case.device)
    return Workload(
        case.labels,
        inputs.bytes,
        dict(contenders(inputs, case.compiled)),
        own_bytes=dict.fromkeys(COPIES, 2 * inputs.picture.nbytes),
    )


OP = Op("q_sample", MODES, workload, peers=("diffusers",), tiny_modes=MODES, grad=False)
