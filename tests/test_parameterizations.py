"""eps, x0, v, the posterior mean and the score determine each other (Math §5)."""

import itertools

import pytest
import torch

from fastdiff.diffusion.parameterizations import QUANTITIES, conversion, convert
from fastdiff.diffusion.schedules import NoiseSchedule

T = 1000


def _all_quantities(schedule, x0, eps):
    """Every quantity at every t, float64, from its definition; x0 and eps are (T, ...)."""

    def at(table):
        return table.reshape(-1, 1)

    a, s = at(schedule.sqrt_alpha_bars), at(schedule.sqrt_one_minus_alpha_bars)
    x_t = a * x0 + s * eps
    mean = at(schedule.posterior_mean_coef_x0) * x0 + at(schedule.posterior_mean_coef_x_t) * x_t
    quantities = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "mean": mean, "score": -eps / s}
    return x_t, quantities


@pytest.mark.parametrize(("source", "target"), [*itertools.product(QUANTITIES, QUANTITIES)])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_every_pair_at_every_timestep(name, source, target):
    schedule = NoiseSchedule.from_name(name, T)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(T, 8, dtype=torch.float64, generator=generator) * 2 - 1
    eps = torch.randn(T, 8, dtype=torch.float64, generator=generator)
    x_t, quantities = _all_quantities(schedule, x0, eps)
    coef_x_t, coef = (c.reshape(-1, 1) for c in conversion(schedule, source, target))
    actual = coef_x_t * x_t + coef * quantities[source]
    # The two terms of the sum may be much larger than the result; each is right to a few ulps.
    scale = (coef_x_t * x_t).abs() + (coef * quantities[source]).abs()
    error = (actual - quantities[target]).abs() / scale
    # 1 - beta near beta = 0.999 and the data's own rounding: some hundred ulps of 2.2e-16.
    assert float(error.max()) < 1e-12


SCHEDULES = {
    "linear": NoiseSchedule.linear(T),
    "cosine": NoiseSchedule.cosine(T),
    "zero_snr": NoiseSchedule.linear(T).rescale_zero_terminal_snr(),
}


INVERTIBLE = [
    (name, *pair)
    for name in SCHEDULES
    for pair in itertools.permutations(QUANTITIES, 2)
    # At the last timestep of zero terminal SNR neither eps nor the score determines x0.
    if name != "zero_snr" or len({"eps", "score"}.intersection(pair)) != 1
]


@pytest.mark.parametrize(("name", "source", "target"), INVERTIBLE)
def test_float32_conversions_invert_at_every_timestep(name, source, target):
    schedule = SCHEDULES[name]
    t = torch.arange(T)
    generator = torch.Generator().manual_seed(0)
    x_t, value = torch.randn(2, T, 8, generator=generator).unbind(0)
    there = convert(schedule, source, target, value, x_t, t)
    back = convert(schedule, target, source, there, x_t, t)
    # The rounding of `there`, carried through the way back.
    a, b = (c.abs().float()[:, None] for c in conversion(schedule, source, target))
    c, d = (c.abs().float()[:, None] for c in conversion(schedule, target, source))
    bound = 4 * 1.2e-7 * (d * (a * x_t.abs() + b * value.abs()) + c * x_t.abs() + value.abs())
    assert bool(((back - value).abs() <= bound).all())


def test_coefficients_are_float32_for_bf16_tensors():
    schedule = NoiseSchedule.linear(T)
    t = torch.arange(T)
    x_t = torch.zeros(T, 1, dtype=torch.bfloat16)
    eps = torch.ones(T, 1, dtype=torch.bfloat16)
    v = convert(schedule, "eps", "v", eps, x_t, t)
    assert v.dtype == torch.bfloat16
    expected = (1 / schedule.sqrt_alpha_bars).float().to(torch.bfloat16)[:, None]
    assert torch.equal(v, expected)


@pytest.mark.parametrize(
    ("source", "target"), [*itertools.product(["x0", "v", "mean"], QUANTITIES)]
)
def test_zero_terminal_snr(source, target):
    schedule = NoiseSchedule.linear(20).rescale_zero_terminal_snr()
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 20, 3, dtype=torch.float64, generator=generator).unbind(0)
    x_t, quantities = _all_quantities(schedule, x0, eps)
    actual = convert(schedule, source, target, quantities[source], x_t, torch.arange(20))
    # Float32 coefficients; the largest, 1/c0 and 1/s^2, amplify them.
    torch.testing.assert_close(actual, quantities[target], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("source", ["eps", "score"])
def test_zero_terminal_snr_refuses_what_eps_cannot_tell(source):
    schedule = NoiseSchedule.jsd(10)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        convert(schedule, source, "x0", x, x, torch.tensor([0]))


def test_errors_name_the_argument():
    schedule, x, t = NoiseSchedule.linear(10), torch.zeros(1, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="unknown source 'noise'; choose from eps, x0, v, mean"):
        convert(schedule, "noise", "x0", x, x, t)
    with pytest.raises(ValueError, match="unknown target 'noise'"):
        convert(schedule, "x0", "noise", x, x, t)
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected \(1, 2\)"):
        convert(schedule, "x0", "eps", torch.zeros(1, 3), x, t)
