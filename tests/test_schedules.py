"""Noise schedules and the tables that follow from the betas (Math §1-§4)."""

import numpy as np
import pytest
import torch

from fastdiff.diffusion.schedules import SCHEDULES, NoiseSchedule

# float64 tables of up to 1,000 factors: each adds at most an ulp, 2.2e-16.
RTOL = 1000 * 2.2e-16

T = 1000


def _betas(name: str, num: int) -> np.ndarray:
    """Math §2 in extended precision, written independently of the package."""
    ld = np.longdouble
    t = np.arange(1, num + 1, dtype=ld)
    ramp = (t - 1) / max(num - 1, 1)
    lo, hi = ld(1e-4), ld(0.02)
    if name == "linear":
        return lo + (hi - lo) * ramp
    if name in ("quadratic", "scaled_linear"):
        return (lo**0.5 + (hi**0.5 - lo**0.5) * ramp) ** 2
    if name == "constant":
        return np.full(num, hi)
    if name == "jsd":
        return 1 / (num - t + 1)
    if name == "sigmoid":
        return lo + (hi - lo) / (1 + np.exp(-(-6 + 12 * ramp)))

    def abar(u):
        return np.cos((u + ld("0.008")) / ld("1.008") * np.arctan(ld(1)) * 2) ** 2

    return np.minimum(1 - abar(t / num) / abar((t - 1) / num), ld("0.999"))


@pytest.mark.parametrize("num", [1, 2, 10, T])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_table_follows_from_the_definition(name, num):
    schedule = NoiseSchedule.from_name(name, num)
    beta = _betas(name, num)
    alpha = 1 - beta
    abar = np.cumprod(alpha)
    abar_prev = np.concatenate([[1], abar[:-1]])
    variance = (1 - abar_prev) / (1 - abar) * beta
    expected = {
        "betas": beta,
        "alphas": alpha,
        "alpha_bars": abar,
        "alpha_bars_prev": abar_prev,
        "sqrt_alpha_bars": np.sqrt(abar),
        "sqrt_one_minus_alpha_bars": np.sqrt(1 - abar),
        "posterior_variance": variance,
        "posterior_mean_coef_x0": np.sqrt(abar_prev) * beta / (1 - abar),
        "posterior_mean_coef_x_t": np.sqrt(alpha) * (1 - abar_prev) / (1 - abar),
        "snr": abar / (1 - abar),
    }
    for field, values in expected.items():
        actual = getattr(schedule, field)
        assert actual.dtype == torch.float64
        # 1 - alpha where beta is near 1 (cosine, jsd) loses relative but not absolute accuracy, and
        # 1 - abar here is a subtraction: 1e-19/1e-4 of extended precision.
        np.testing.assert_allclose(
            actual.numpy(), values.astype(np.float64), rtol=20 * RTOL, atol=1e-17, err_msg=field
        )
    clipped = np.log(np.concatenate([variance[1:2], variance[1:]]) if num > 1 else beta)
    np.testing.assert_allclose(
        schedule.posterior_log_variance_clipped.numpy(), clipped.astype(np.float64), atol=1e-11
    )


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("linear", "linear"),
        ("scaled_linear", "scaled_linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("sigmoid", "sigmoid"),
    ],
)
def test_alpha_bars_agree_with_diffusers(name, theirs):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule=theirs)
    ours = NoiseSchedule.from_name(name, T).alpha_bars
    # Theirs are cumulative products of T float32 factors: up to T/2 ulps of 1.2e-7.
    torch.testing.assert_close(
        ours.float(), scheduler.alphas_cumprod, rtol=T / 2 * 1.2e-7, atol=1e-7
    )


def test_rescale_to_zero_terminal_snr_agrees_with_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    schedule = NoiseSchedule.linear(T)
    rescaled = schedule.rescale_zero_terminal_snr()
    # Their differences of neighbouring sqrt(abar) cancel: about 1e-16 / 1e-4 relative.
    torch.testing.assert_close(
        rescaled.betas, rescale_zero_terminal_snr(schedule.betas), rtol=1e-10, atol=1e-12
    )
    assert float(rescaled.alpha_bars[-1]) == 0
    assert rescaled.has_zero_terminal_snr
    assert not schedule.has_zero_terminal_snr
    torch.testing.assert_close(rescaled.alpha_bars[0], schedule.alpha_bars[0], rtol=RTOL, atol=0)


@pytest.mark.parametrize("name", ["jsd", "linear"])
def test_rescaling_twice_changes_nothing(name):
    once = NoiseSchedule.from_name(name, 50).rescale_zero_terminal_snr()
    twice = once.rescale_zero_terminal_snr()
    torch.testing.assert_close(twice.betas, once.betas, rtol=1e-12, atol=0)


def test_one_minus_alpha_bar_does_not_cancel():
    # 1 - abar = 1e-12 k up to O(1e-24): a subtraction from 1 would be off by 1e-4 relative.
    schedule = NoiseSchedule(torch.full((10,), 1e-12, dtype=torch.float64))
    expected = 1e-12 * torch.arange(1, 11, dtype=torch.float64)
    torch.testing.assert_close(schedule.one_minus_alpha_bars, expected, rtol=1e-10, atol=0)


def test_linear_rescale_keeps_the_terminal_snr():
    # abar_T = exp(-sum beta) to first order in beta, and rescale keeps the sum.
    ends = [
        float(NoiseSchedule.linear(n, rescale=True).alpha_bars[-1].log()) for n in (250, 1000, 4000)
    ]
    np.testing.assert_allclose(ends, [-10.05] * 3, rtol=0.04)


@pytest.mark.parametrize("name", SCHEDULES)
def test_respacing_keeps_alpha_bar_and_composes(name):
    schedule = NoiseSchedule.from_name(name, T)
    indices = [0, 7, 99, 500, 998, 999]
    spaced = schedule.respace(indices)
    torch.testing.assert_close(
        spaced.alpha_bars, schedule.alpha_bars[indices], rtol=10 * RTOL, atol=0
    )
    assert spaced.timesteps.tolist() == indices
    again = spaced.respace([1, 3, 5])
    assert again.timesteps.tolist() == [7, 500, 999]
    torch.testing.assert_close(
        again.alpha_bars, schedule.alpha_bars[[7, 500, 999]], rtol=10 * RTOL, atol=0
    )
    torch.testing.assert_close(schedule.respace(range(T)).betas, schedule.betas, rtol=1e-12, atol=0)


def test_respacing_across_a_beta_of_one():
    schedule = NoiseSchedule([0.1, 1.0, 0.2, 0.3, 1.0])
    spaced = schedule.respace([1, 3, 4])
    torch.testing.assert_close(
        spaced.betas, torch.tensor([1.0, 1 - 0.8 * 0.7, 1.0], dtype=torch.float64)
    )


def test_prior_kl_is_the_kl_to_the_standard_normal():
    schedule = NoiseSchedule.linear(50)
    x0 = torch.rand(3, 2, 4, 4, dtype=torch.float64) * 2 - 1
    normal = torch.distributions.Normal
    nats = torch.distributions.kl_divergence(
        normal(schedule.sqrt_alpha_bars[-1] * x0, schedule.sqrt_one_minus_alpha_bars[-1]),
        normal(torch.zeros_like(x0), 1.0),
    )
    expected = nats.flatten(1).mean(1) / np.log(2)
    torch.testing.assert_close(schedule.prior_kl(x0), expected, rtol=1e-12, atol=0)
    assert float(NoiseSchedule.jsd(10).prior_kl(x0).abs().max()) == 0


def test_device_tables_are_float32_and_built_once():
    schedule = NoiseSchedule.linear(T)
    tables = schedule.tables("cpu")
    assert schedule.tables(torch.device("cpu")) is tables
    assert torch.equal(tables.sqrt_alpha_bar, schedule.sqrt_alpha_bars.float())
    assert torch.equal(tables.posterior_coef_x_t, schedule.posterior_mean_coef_x_t.float())
    assert tables.log_beta.dtype == torch.float32


def test_tables_first_used_in_inference_mode_serve_autograd_later():
    schedule = NoiseSchedule.linear(10)
    with torch.inference_mode():
        table = schedule.tables("cpu").sqrt_alpha_bar
    x = torch.ones(10, requires_grad=True)
    (x * table).sum().backward()
    assert torch.equal(x.grad, schedule.sqrt_alpha_bars.float())


@pytest.mark.parametrize("array", [torch.clone, torch.Tensor.numpy], ids=["torch", "numpy"])
def test_what_the_caller_does_to_its_arrays_later_is_not_seen(array):
    betas = array(torch.tensor([0.1, 0.2], dtype=torch.float64))
    timesteps = array(torch.tensor([3, 7]))
    schedule = NoiseSchedule(betas, timesteps=timesteps)
    betas[0], timesteps[0] = 0.9, 5
    assert schedule.betas.tolist() == [0.1, 0.2]
    assert schedule.timesteps.tolist() == [3, 7]


def test_host_tables_first_used_without_grad_stay_differentiable():
    betas = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    schedule = NoiseSchedule(betas)
    schedule.ddpm_table()  # computed under no_grad
    assert schedule.sqrt_alpha_bars.requires_grad
    first, second = schedule.tables("cpu"), schedule.tables("cpu")
    assert first.beta.requires_grad
    assert first is not second


def test_learned_betas_are_differentiable():
    betas = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)

    def tables(betas):
        schedule = NoiseSchedule(betas)
        return (
            schedule.sqrt_alpha_bars,
            schedule.sqrt_one_minus_alpha_bars,
            schedule.posterior_log_variance_clipped,
            schedule.posterior_mean_coef_x0,
            schedule.respace([1, 3]).betas,
        )

    assert torch.autograd.gradcheck(tables, betas)
    assert NoiseSchedule(betas).tables("cpu").sqrt_alpha_bar.requires_grad


@pytest.mark.parametrize(
    ("betas", "error", "message"),
    [
        ([], ValueError, r"shape \(0,\)"),
        ([[0.1]], ValueError, r"shape \(1, 1\)"),
        ([0.1, 0.0], ValueError, r"betas\[1\] is 0.0"),
        ([0.1, 1.5], ValueError, r"betas\[1\] is 1.5"),
        ([float("nan")], ValueError, r"betas\[0\] is nan"),
        ([float("inf")], ValueError, r"betas\[0\] is inf"),
        (["a"], TypeError, "real numbers"),
        (torch.tensor([True]), TypeError, "torch.bool"),
    ],
)
def test_bad_betas(betas, error, message):
    with pytest.raises(error, match=message):
        NoiseSchedule(betas)


def test_betas_from_lists_arrays_and_tensors_keep_their_precision():
    values = [0.1, 0.2]
    expected = torch.tensor(values, dtype=torch.float64)
    for betas in (values, np.array(values), expected):
        assert torch.equal(NoiseSchedule(betas).betas, expected)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown schedule 'cosin'; choose from linear, .*cosine"):
        NoiseSchedule.from_name("cosin")


@pytest.mark.parametrize(("num", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_bad_number_of_timesteps(num, error):
    with pytest.raises(error, match="num_timesteps is"):
        NoiseSchedule.linear(num)


def test_rescale_that_leaves_the_range_says_what_T_it_needs():
    with pytest.raises(ValueError, match="expected T >= 20"):
        NoiseSchedule.linear(10, rescale=True)
    with pytest.raises(ValueError, match="T >= 2"):
        NoiseSchedule.constant(1).rescale_zero_terminal_snr()


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([], ValueError, r"shape \(0,\)"),
        ([3, 1], ValueError, "3 is followed by 1"),
        ([1, 1], ValueError, "1 is followed by 1"),
        ([-1, 2], ValueError, r"expected 0\.\.9"),
        ([5, 10], ValueError, r"expected 0\.\.9"),
        ([0.5], TypeError, "expected integers"),
    ],
)
def test_bad_indices(indices, error, message):
    with pytest.raises(error, match=message):
        NoiseSchedule.linear(10).respace(indices)
