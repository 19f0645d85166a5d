"""vlb_terms: every implementation against float64, forward and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from op_harness import (
    IMPLEMENTATIONS,
    ON_GPU,
    assert_close,
    case_params,
    evaluate,
    implementation_params,
)
from op_harness.inputs import SHAPES
from op_harness.vlb_terms_cases import (
    FLOATS,
    SCHEDULE,
    TABLES,
    Case,
    Magnitudes,
    arguments,
    double_arguments,
)
from ptx_emulator.counters import Requests
from torch import Tensor

from fastdiff import ops, reference
from fastdiff.ops.vlb_terms import Arguments, _reference
from fastdiff.reference.step_columns import PREDICTIONS

CASES = [
    *(
        Case(shape="odd", dtype=dtype, prediction=prediction, variance=variance, clip=clip)
        for dtype, prediction, variance, clip in zip(
            ["fp32", "bf16", "fp16"] * 6,
            [*PREDICTIONS, *PREDICTIONS, *PREDICTIONS, "eps", "v"],
            ["fixed_large", "learned", "fixed_small", "learned_range", "learned"] * 3,
            [True, False, False, True, True, False, False] * 2,
            strict=False,
        )
    ),
    *(Case(dtype=dtype, mode=mode) for dtype in FLOATS for mode in ("given", "seed")),
    *(
        Case(shape=shape, layout="channels_last", dtype=dtype, mode=mode, variance=variance)
        for shape, dtype, mode, variance in (
            ("vectors", "bf16", "given", "learned_range"),
            ("vectors", "bf16", "seed", "fixed_large"),
            ("several chunks", "fp32", "seed", "learned_range"),
            ("many channels", "fp32", "given", "learned"),
            ("many channels", "bf16", "given", "learned"),
            ("odd", "fp16", "seed", "learned"),
            ("volume", "bf16", "given", "fixed_small"),
        )
    ),
    *(
        Case(shape=shape, variance=variance)
        for shape in SHAPES
        if shape not in ("vectors", "odd")
        for variance in ("fixed_large", "learned_range")
    ),
    *(
        Case(layout=layout, dtype=dtype)
        for layout in ("sliced", "sliced channels_last", "expanded", "misaligned")
        for dtype in ("fp32", "bf16")
    ),
    Case(dtype="bf16", data="fp32"),
    Case(dtype="fp32", data="bf16", mode="seed"),
    Case(mode="keys", t=(999, 1)),
]
GRADIENT_CASES = [
    *(
        Case(shape="odd", dtype=dtype, prediction=prediction, variance=variance, clip=clip)
        for dtype, prediction, variance, clip in (
            ("fp32", "eps", "learned_range", False),
            ("fp32", "x0", "fixed_small", True),
            ("fp16", "v", "learned", False),
            ("bf16", "mean", "fixed_large", True),
            ("bf16", "eps", "fixed_large", False),
            ("fp32", "mean", "learned", False),
        )
    ),
    Case(mode="seed", clip=False),
    Case(dtype="bf16", mode="seed", detach_mean=True),
    Case(layout="channels_last", dtype="bf16", clip=False),
    Case(shape="several chunks", layout="channels_last", mode="seed", variance="fixed_small"),
    Case(shape="odd", layout="channels_last", dtype="fp16", mode="seed"),
    Case(shape="pictures", layout="channels_last", dtype="fp16", mode="keys", detach_mean=True),
    Case(layout="misaligned channels_last", dtype="bf16", data="fp32"),
    Case(layout="sliced"),
    Case(shape="batch 0"),
    Case(dtype="fp16", data="fp32", variance="fixed_small"),
]


def operations(args: dict) -> int:
    """Roundings of one term and of their sum.

    A term: x0^ and its error (4), z (3), exponentials and logarithms of a few ulps each, the scaled
    tail within 7 and the quotients around it (40 together), a normal of 4 ulps twice (16). The sum:
    a chain over the elements of one thread and over a lane's chunks, at most 64 here, and trees of
    at most 10 levels, twice.
    """
    return 4 + 3 + 40 + 16 + 64 + len(args["x_t"]) + 20


def expected(args: dict) -> Tensor:
    return _reference(Arguments(**double_arguments(args)))


@pytest.mark.parametrize(("case", "implementation"), case_params(CASES, "dtype", "layout"))
def test_forward(case: Case, implementation: str) -> None:
    args = arguments(case)
    (terms,) = evaluate("vlb_terms", implementation, args).outputs
    assert terms.dtype == torch.float32
    magnitudes = Magnitudes(args, torch.zeros(terms.shape))
    for name, actual, exact in zip(("kl", "x0_mse", "eps_mse"), terms, expected(args), strict=True):
        assert_close(
            actual, exact, magnitude=getattr(magnitudes, name), operations=operations(args)
        )


@pytest.mark.parametrize(("case", "implementation"), case_params(GRADIENT_CASES, "dtype", "layout"))
def test_gradients(case: Case, implementation: str) -> None:
    args = arguments(case)
    batch, channels = args["x_t"].shape[:2]
    grad = torch.tensor([[1.5], [-0.75], [0.25]]) * torch.linspace(0.5, 1.5, batch)
    result = evaluate(
        "vlb_terms", implementation, args, gradients=("model_output",), grad_output=grad
    )
    actual = result.gradients["model_output"]
    assert actual.dtype == args["model_output"].dtype
    exact = double_arguments(args)
    output = exact["model_output"] = exact["model_output"].requires_grad_()
    terms = _reference(Arguments(**exact))
    (wanted,) = torch.autograd.grad(terms, output, grad.double())
    magnitudes = Magnitudes(args, grad)
    halves = [("output", slice(0, channels))]
    halves += [("v", slice(channels, None))] if args["learned"] else []
    for name, half in halves:
        assert_close(
            actual[:, half],
            wanted[:, half],
            magnitude=getattr(magnitudes, name),
            operations=80,
            implementation=implementation,
        )


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "dtype", "mode", "variance"),
    [
        ("several chunks", "fp32", "given", "learned_range"),
        ("several chunks", "bf16", "seed", "fixed_large"),
        ("pictures", "bf16", "given", "learned_range"),
    ],
)
def test_traffic(
    shape: str, dtype: str, mode: str, variance: str, layout: str, arch: str, implementation: str
) -> None:
    """Forward: each input once. Backward of kl: x0, x_t, the output, and its gradient, once."""
    args = arguments(Case(shape, layout, dtype, mode=mode, variance=variance, t=(37,)))
    args["table"] = args["table"][:38]  # smaller than the images
    grad = torch.tensor([[1.0], [0.0], [0.0]])
    result = evaluate(
        "vlb_terms",
        implementation,
        args,
        gradients=("model_output",),
        grad_output=grad,
        arch=arch,
        count=True,
    )
    size = args["x_t"].numel() * args["x_t"].element_size()
    heads = 2 if args["learned"] else 1
    first, finish, backward = result.launches
    inputs = 2 + heads + (mode == "given")
    for launch, tensors in ((first, inputs), (backward, 2 + 2 * heads)):
        large = [array for array in launch.counters.arrays if array.size >= size]
        moved = sum(array.loaded_bytes + array.stored_bytes for array in large)
        small = [array for array in launch.counters.arrays if array.size < size]
        if launch is first:
            small += finish.counters.arrays
        moved += sum(array.unique_loaded_bytes + array.stored_bytes for array in small)
        assert moved <= 1.05 * tensors * size
        requests = sum((a.load_requests + a.store_requests for a in large), Requests())
        assert set(requests.widths) == {16}
        assert requests.sectors <= 1.05 * requests.min_sectors


@pytest.mark.parametrize(
    "implementation", implementation_params("cpu", "triton-ptx", "cuda-ptx", *ON_GPU)
)
def test_a_sample_does_not_depend_on_its_batch(implementation: str) -> None:
    args = arguments(Case(mode="keys"))
    (both,) = evaluate("vlb_terms", implementation, args).outputs
    alone = dict(args)
    for name in ("x0", "x_t", "model_output", "t", "keys"):
        alone[name] = args[name][1:]
    (one,) = evaluate("vlb_terms", implementation, alone).outputs
    assert torch.equal(one, both[:, 1:])


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx", *ON_GPU))
def test_samples_of_many_chunks(implementation: str) -> None:
    """Above 1024 blocks of 512 elements a sample, each program sums more than one of them."""
    args = arguments(Case(shape="one element", variance="fixed_large", t=(0,)))
    generator = torch.Generator().manual_seed(2)
    shape = (1, 1030 * 512 + 4)
    x0, noise, output = (torch.randn(shape, generator=generator) for _ in range(3))
    x_t = x0 + 0.01 * noise
    args |= {"x0": x0.clamp(-1, 1), "x_t": x_t, "model_output": output, "noise": noise}
    result = evaluate("vlb_terms", implementation, args, racecheck=False)
    if implementation.endswith("-ptx"):
        assert 132 <= math.prod(result.launches[0].grid) <= 1024
    magnitudes = Magnitudes(args, torch.zeros(3, 1))
    assert_close(
        result.outputs[0][0],
        expected(args)[0],
        magnitude=magnitudes.kl,
        operations=operations(args),
    )


def eager_terms(args: dict) -> Tensor:
    """The formulas as published code writes them, in the dtype of the tensors (Math §6)."""
    t, dtype = args["t"], args["x_t"].dtype

    def row(column: int) -> Tensor:
        return args["table"][t, column].to(dtype).reshape(-1, 1, 1, 1)

    c = reference.StepColumn
    x0, x, eps = args["x0"], args["x_t"], args["model_output"]
    pred = row(c.RECIP_SQRT_ALPHA_BAR) * x - row(c.NOISE_TO_SIGNAL) * eps
    pred = pred.clamp(-1, 1)
    pred_eps = row(c.RECIP_SQRT_ONE_MINUS_ALPHA_BAR) * x - row(c.SIGNAL_TO_NOISE) * pred
    mean1 = row(c.COEF_X0) * x0 + row(c.COEF_X_T) * x
    mean2 = row(c.COEF_X0) * pred + row(c.COEF_X_T) * x
    lv1, lv2 = row(c.POSTERIOR_LOG_VARIANCE), row(c.LOG_VARIANCE)
    kl = lv2 - lv1 - 1 + (lv1 - lv2).exp() + (mean1 - mean2).square() * (-lv2).exp()
    kl = 0.5 * kl / math.log(2)
    rest = (x0 - pred).square(), (args["noise"] - pred_eps).square()
    return torch.stack([terms.flatten(1).mean(1) for terms in (kl, *rest)])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_no_worse_than_eager(dtype: str) -> None:
    """Millions of elements: the fused sums are those of float32, eager's are what it computes."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 4, 1024, 512)
    x0, noise, error = (torch.randn(shape, generator=generator) for _ in range(3))
    t, tables = torch.tensor([100, 500]), SCHEDULE.tables("cpu")
    x0 = x0.clamp(-1, 1)
    x_t = ops.q_sample(x0, t, tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar, noise)
    half = [x.to(FLOATS[dtype]) for x in (x0, x_t, noise + 0.3 * error, noise)]
    args = arguments(Case(shape="one element", variance="fixed_large"))
    args |= dict(zip(("x0", "x_t", "model_output", "noise"), half, strict=True)) | {"t": t}
    exact = expected(args)
    fused = torch.stack(
        ops.vlb_terms(*half[:3], t, TABLES["fixed_large"], noise=half[3]),
    )
    fused_error, eager_error = (
        ((terms.double() - exact) / exact).abs() for terms in (fused, eager_terms(args))
    )
    print(f"{dtype}: relative error fused {fused_error.max():.3g}, eager {eager_error.max():.3g}")
    assert bool((fused_error <= eager_error.clamp(min=2**-20)).all())
    assert fused_error.max() <= 1e-4


EXTREME_SIGMA = [1e-5, 1e-3, 0.01, 0.3, 1.0, 30.0]
EXTREME_DISTANCE = [0.0, 1e-4, 1 / 255, 0.02, 0.5, 1.9, 10.0]


@pytest.mark.parametrize(
    "implementation",
    [
        *implementation_params(*(n for n in IMPLEMENTATIONS if n != "triton-interpreted")),
        # Its programs run one by one in Python; compiled, all of them are run.
        pytest.param("triton-interpreted", marks=pytest.mark.slow),
    ],
)
def test_decoder_in_the_tails(implementation: str) -> None:
    """Every sigma with every distance, in inner and outer bins, against 60 digits."""
    mpmath = pytest.importorskip("mpmath")
    cases = [
        (level, sigma, distance)
        for level in (0, 1, 128, 254, 255)
        for sigma in EXTREME_SIGMA
        for distance in (*EXTREME_DISTANCE, *(-d for d in EXTREME_DISTANCE[1:]))
    ]
    level, sigma, distance = torch.tensor(cases, dtype=torch.float64).T
    x0 = (2 * level / 255 - 1).float()
    output = torch.stack([x0 - distance.float(), 2 * sigma.float().log()], 1)
    batch = len(cases)
    args = arguments(Case(shape="one element", prediction="x0", variance="learned"))
    args |= {
        "x0": x0.reshape(batch, 1),
        "x_t": torch.zeros(batch, 1),
        "model_output": output,
        "t": torch.zeros(batch, dtype=torch.int64),
        "noise": torch.zeros(batch, 1),
        "clip": False,
    }
    grad = torch.tensor([[1.0], [0.0], [0.0]]).expand(3, batch)
    result = evaluate(
        "vlb_terms", implementation, args, gradients=("model_output",), grad_output=grad
    )
    bits, gradient = result.outputs[0][0], result.gradients["model_output"]
    assert bool(bits.isfinite().all() and gradient.isfinite().all())
    wanted = torch.tensor(
        [
            decoder_digits(mpmath, int(k), x.item(), mean.item(), log_variance.item())
            for k, x, (mean, log_variance) in zip(level, x0, output, strict=True)
        ],
        dtype=torch.float64,
    )
    magnitudes = Magnitudes(args, grad)
    # Probabilities and their logarithms end where float32's normal numbers do.
    magnitude = magnitudes.kl + 2**24 * torch.finfo(torch.float32).tiny
    assert_close(bits, wanted, magnitude=magnitude, operations=operations(args) - batch)


def decoder_digits(
    mpmath: object, level: int, x0: float, mean: float, log_variance: float
) -> float:
    """-log2 of the probability of a bin, with 60 digits, from the definition."""
    with mpmath.workdps(60):
        scale = mpmath.exp(mpmath.mpf(-log_variance) / 2) / mpmath.sqrt(2)
        half = mpmath.mpf(1) / 255
        # Tails on the side of the mean where they are small.
        low, high = (scale * (mpmath.mpf(x0) - mpmath.mpf(mean) + s * half) for s in (-1, 1))
        if level == 0:
            mass = mpmath.erfc(-high) / 2
        elif level == 255:
            mass = mpmath.erfc(low) / 2
        elif low > 0:
            mass = (mpmath.erfc(low) - mpmath.erfc(high)) / 2
        else:
            mass = (mpmath.erfc(-high) - mpmath.erfc(-low)) / 2
        return float(-mpmath.log(mass, 2))


def test_all_bins_add_up_to_one() -> None:
    """sum_k p(x0 = level k | x_1) = 1: the bins cover the line and do not overlap."""
    levels = (2 * torch.arange(256) / 255 - 1).reshape(256, 1)
    for mean, log_variance in ((0.3, -9.0), (-1.2, -4.0), (0.98, 1.0), (0.0, 6.0)):
        output = torch.tensor([[mean, log_variance]]).expand(256, 2)
        x_t, t = torch.zeros(256, 1), torch.zeros(256, dtype=torch.int64)
        how = {"noise": x_t, "prediction": "x0", "variance": "learned", "clip": False}
        bits, _, _ = ops.vlb_terms(levels, x_t, output, t, TABLES["learned"], **how)
        total = (-bits.double() * math.log(2)).exp().sum().item()
        assert abs(total - 1) < 1e-5


def test_a_perfect_network_pays_for_the_variance_alone() -> None:
    """With eps itself as the output KL = (log r - 1 + 1/r) / 2, r = beta / beta~ (Math §6)."""
    t = torch.arange(1, 1000)
    x0 = torch.rand(999, 1, 2, 2) * 2 - 1
    noise = ops.philox_normal(x0.shape, seed=1)
    tables = SCHEDULE.tables("cpu")
    x_t = ops.q_sample(x0, t, tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar, seed=1)
    for variance in ("fixed_small", "fixed_large"):
        how = {"variance": variance, "clip": False}
        kl, x0_mse, eps_mse = ops.vlb_terms(x0, x_t, noise, t, TABLES[variance], seed=1, **how)
        ratio = SCHEDULE.betas[1:] / SCHEDULE.posterior_variance[1:]
        ratio = ratio if variance == "fixed_large" else torch.ones_like(ratio)
        wanted = 0.5 * (ratio.log() - 1 + 1 / ratio) / math.log(2)
        # x0^ has float32 errors of up to 1 / sqrt(abar) = 160 ulps, which the bound weighs little.
        torch.testing.assert_close(kl.double(), wanted, rtol=1e-4, atol=2e-6)
        assert x0_mse.max() < 1e-8
        assert eps_mse.max() < 1e-10


@pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx", *ON_GPU))
def test_timesteps_outside_the_table_are_nan(implementation: str) -> None:
    args = arguments(Case()) | {"t": torch.tensor([1000, 5])}
    grad = torch.ones(3, 2)
    result = evaluate(
        "vlb_terms", implementation, args, gradients=("model_output",), grad_output=grad
    )
    assert bool(result.outputs[0][:, 0].isnan().all())
    assert bool(result.outputs[0][:, 1].isfinite().all())
    assert bool(result.gradients["model_output"][0].isnan().all())
    assert bool(result.gradients["model_output"][1].isfinite().all())
