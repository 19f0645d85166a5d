"""What the tests of ddim_step and ddpm_step share: cases, arguments, the float64 result, bounds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from ptx_emulator.counters import Requests
from torch import Tensor

import fastdiff
from fastdiff import reference
from fastdiff.ops._sampler_step import DDPM, Arguments, run_reference
from fastdiff.reference.step_columns import PREDICTIONS, StepColumn

from .evaluate import implementation_params
from .inputs import SHAPES, arrange

FLOATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
MODES = ("none", "given", "seed")  # of noise
INDICES = (0, 3, 40, 333, 700, 999)


@dataclass(frozen=True)
class Case:
    shape: str = "vectors"
    layout: str = "contiguous"
    x: str = "fp32"
    output: str | None = None  # dtype of the model output, default that of x
    prediction: str = "eps"
    clip: bool = True
    flag: bool = False  # use_clipped_model_output or learned_range
    two_heads: bool = False
    guided: bool = False
    mode: str = "given"  # "seed", "keys", "none"
    noise: str | None = None  # dtype of the noise, default that of x
    return_pred_x0: bool = False

    def __str__(self) -> str:
        parts = [self.shape, self.layout, self.x, self.prediction, self.mode]
        parts += [f"output {self.output}"] if self.output else []
        parts += [f"noise {self.noise}"] if self.noise else []
        names = ("clip", "flag", "two_heads", "guided", "return_pred_x0")
        return ", ".join(parts + [name for name in names if getattr(self, name)])


def exhaustive() -> list[Any]:
    """(prediction, shape, layout, x, modes of noise) as pytest parameters.

    The formula of an element does not depend on where it lies: all predictions come with one shape
    in both layouts, and every shape and layout with one of them; predictions and modes take turns.
    """
    places = [
        (shape, layout)
        for shape, sizes in SHAPES.items()
        for layout in ("contiguous", "channels_last")
        if layout == "contiguous" or len(sizes) >= 4
    ]
    predictions, shifts = itertools.cycle(PREDICTIONS), itertools.cycle(range(len(MODES)))
    grid = [
        (prediction, shape, layout, next(shifts))
        for shape, layout in places
        for prediction in (PREDICTIONS if shape == "odd" else [next(predictions)])
    ]
    return [
        pytest.param(prediction, shape, layout, x, MODES[k:] + MODES[:k],
                     id=f"{prediction}-{shape}-{layout}-{x}")
        for prediction, shape, layout, k in grid
        for x in ("fp32", "bf16", "fp16")
    ]  # fmt: skip


def table_for(op: str, variance: str = "learned_range", eta: float = 0.7) -> Tensor:
    schedule = fastdiff.NoiseSchedule.linear(1000)
    if op == DDPM:
        return schedule.ddpm_table(INDICES, variance)
    return schedule.ddim_table(INDICES, eta)


def arguments(op: str, case: Case, seed: int = 0) -> dict[str, Any]:
    """The raw operator's arguments: a model that is about right, so that some x0 are clipped."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES[case.shape]
    batch, channels = shape[:2]
    schedule = fastdiff.NoiseSchedule.linear(1000)
    step = torch.tensor([5, 0, 2, 3])[torch.arange(batch) % 4]
    rows = torch.tensor(INDICES)[step]
    broadcast = (-1, *[1] * (len(shape) - 1))
    a = schedule.sqrt_alpha_bars[rows].view(broadcast)
    s = schedule.sqrt_one_minus_alpha_bars[rows].view(broadcast)
    c0 = schedule.posterior_mean_coef_x0[rows].view(broadcast)
    c1 = schedule.posterior_mean_coef_x_t[rows].view(broadcast)
    x0, eps, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    x_t = a * x0 + s * eps
    output = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "mean": c0 * x0 + c1 * x_t}
    dtype = FLOATS[case.x]
    output_dtype = FLOATS[case.output or case.x]

    def model_output() -> Tensor:
        disturbed = output[case.prediction]
        disturbed = disturbed + 0.01 * torch.randn(shape, generator=generator)
        if case.two_heads:
            v = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
            disturbed = torch.cat([disturbed, v], 1)
        layout = case.layout
        if layout == "channels_last" and channels == 1 and case.two_heads:
            layout = "contiguous"
        return arrange(disturbed.to(output_dtype), layout)

    return Arguments(
        x_t=arrange(x_t.to(dtype), case.layout),
        model_output=model_output(),
        step=step,
        table=table_for(op),
        prediction=PREDICTIONS.index(case.prediction),
        clip=case.clip,
        flag=case.flag,
        uncond=model_output() if case.guided else None,
        guidance_scale=2.5 if case.guided else 1.0,
        noise=arrange(noise.to(FLOATS[case.noise] if case.noise else dtype), case.layout)
        if case.mode == "given"
        else None,
        keys=reference.sample_keys(-7, batch) if case.mode == "keys" else None,
        seed=2**63 - 5 if case.mode == "seed" else None,
        stream=2**40 + 3,
        return_pred_x0=case.return_pred_x0,
    )._asdict()


def widened(args: dict[str, Any]) -> Arguments:
    """The same arguments with float64 tensors: the oracle's. The table stays as it is."""
    a = Arguments(**args)
    return a._replace(
        **{
            name: None if (x := getattr(a, name)) is None else x.double()
            for name in ("x_t", "model_output", "uncond", "noise")
        }
    )


def expected(op: str, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """x_s and x0 by the reference in float64."""
    return run_reference(op, widened(args)._replace(return_pred_x0=True))


def magnitudes(op: str, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The sums of the absolute values of all that is added up on the way to x_s and to x0.

    An error of x0 passes the clip undiminished at most, so clipping is left out; eps = x_t / s -
    (a / s) x0 is counted where a step may take it. An error d of the exponent of sigma multiplies
    it with 1 + d.
    """
    a = widened(args)
    c = StepColumn
    row = reference.step_columns.StepRows(a.table.abs(), a.step, a.x_t)
    x = a.x_t.abs()
    channels = x.shape[1]
    output = a.model_output[:, :channels].abs()
    if a.uncond is not None:
        uncond = a.uncond[:, :channels].abs()
        output = uncond + a.guidance_scale * (output + uncond)
    prediction = PREDICTIONS[a.prediction]
    if prediction == "eps":
        x0 = row[c.RECIP_SQRT_ALPHA_BAR] * x + row[c.NOISE_TO_SIGNAL] * output
    elif prediction == "v":
        x0 = row[c.SQRT_ALPHA_BAR] * x + row[c.SQRT_ONE_MINUS_ALPHA_BAR] * output
    elif prediction == "mean":
        x0 = row[c.X0_FROM_MEAN] * output + row[c.X0_FROM_MEAN_X_T] * x
    else:
        x0 = output
    eps = row[c.RECIP_SQRT_ONE_MINUS_ALPHA_BAR] * x + row[c.SIGNAL_TO_NOISE] * x0
    if prediction in ("eps", "v") and not (a.clip and a.flag):
        eps = output + x if prediction == "v" else output
    x_s = row[c.COEF_X0] * x0 + row[c.COEF_X_T] * x
    if op != DDPM:
        x_s = x_s + row[c.COEF_EPS] * eps
    noise = a.noise
    if a.keys is not None or a.seed is not None:
        keys = a.keys if a.seed is None else reference.sample_keys(a.seed, len(x))
        noise = reference.normals(keys, x.shape, a.stream, torch.float64)
    if noise is not None:
        sigma = row[c.SIGMA]
        if op == DDPM and a.flag:
            signed = reference.step_columns.StepRows(a.table, a.step, a.x_t)
            exponent = 0.5 * signed[c.LOG_VARIANCE_SLOPE] * a.model_output[:, channels:]
            sigma = sigma * exponent.exp() * (1 + exponent.abs())
        x_s = x_s + sigma * noise.abs()
    return x_s, x0


def strided(data: st.DataObject, shape: list[int], seed: int) -> Tensor:
    """Normals of this shape with any permutation of dimensions and any step in memory."""
    order = data.draw(st.permutations(range(len(shape))))
    steps = data.draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    stored = [shape[d] * s for d, s in zip(order, steps, strict=True)]
    base = torch.randn(stored, generator=torch.Generator().manual_seed(seed))
    base = base[tuple(slice(None, None, s) for s in steps)]
    return base.permute([order.index(d) for d in range(len(shape))])


def forward_params(cases: list[Case], compiled: list[Case]) -> list[Any]:
    """(case, implementation) for all; Triton kernels, which differ in every case, compile slowly:
    the default run has those of `compiled`."""
    assert set(compiled) <= set(cases)
    params = []
    for case in cases:
        for param in implementation_params():
            (implementation,) = param.values
            marks = list(param.marks)
            if implementation == "triton-ptx" and case not in compiled:
                marks.append(pytest.mark.slow)
            params.append(
                pytest.param(case, implementation, marks=marks, id=f"{case}-{implementation}")
            )
    return params


# Roundings in float32, each at most of the whole sum. x0: guidance 3, two products, a sum. x_s adds
# the coefficients' own (four products or sums), the step's three products and two sums, and for the
# noise product, sum, and sigma's product and exponential (5: 1.3 ulps, and its argument's two).
X0_OPERATIONS = 6
X_S_OPERATIONS = X0_OPERATIONS + 4 + 5 + 8
GENERATED_OPERATIONS = 8  # four ulps of a normal


def assert_traffic(launch: Any, args: dict[str, Any], accesses: int) -> None:
    """The launch moves `accesses` tensors like x_t, coalesced, 16 bytes at a time."""
    size = args["x_t"].nbytes
    tensors = [array for array in launch.counters.arrays if array.size >= size]
    # Every thread also reads its sample's row, which stays in the cache: once is counted.
    small = [array for array in launch.counters.arrays if array.size < size]
    moved = sum(array.loaded_bytes + array.stored_bytes for array in tensors)
    moved += sum(array.unique_loaded_bytes for array in small)
    assert moved <= 1.05 * accesses * size
    requests = sum((a.load_requests + a.store_requests for a in tensors), Requests())
    assert set(requests.widths) == {16}
    assert requests.sectors <= 1.05 * requests.min_sectors
