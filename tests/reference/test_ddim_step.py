"""One DDIM step against DDIM eq. 12 in float64 and against diffusers (Math §7)."""

import math

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.reference.ddim_step import ddim_step
from fastdiff.reference.step_columns import StepColumn

T = 1000
SHAPE = (5, 2, 4, 4)
INDICES = [3, 40, 333, 700, 999]
PREDICTIONS = ["eps", "x0", "v", "mean"]


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear(T)


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * 0.7
    eps, noise = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64).unbind(0)
    return x0, eps, noise


def _column(values):
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def _forward(schedule, x0, eps, indices):
    a = _column(schedule.sqrt_alpha_bars[indices])
    s = _column(schedule.sqrt_one_minus_alpha_bars[indices])
    x_t = a * x0 + s * eps
    c0 = _column(schedule.posterior_mean_coef_x0[indices])
    c1 = _column(schedule.posterior_mean_coef_x_t[indices])
    outputs = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "mean": c0 * x0 + c1 * x_t}
    return x_t, outputs


def _equation_12(schedule, indices, x0, eps, noise, eta, sigma_hat):
    """DDIM eqs. 12 and 16 as printed, one sample per index."""
    bars = schedule.alpha_bars[indices].tolist()
    previous = [1.0, *bars[:-1]]
    rows = []
    for i, (bar, prev) in enumerate(zip(bars, previous, strict=True)):
        sigma = eta * math.sqrt((1 - prev) / (1 - bar)) * math.sqrt(1 - bar / prev)
        scale = math.sqrt(1 - bar / prev) if sigma_hat and i else sigma
        direction = math.sqrt(max(1 - prev - sigma**2, 0))
        rows.append(math.sqrt(prev) * x0[i] + direction * eps[i] + scale * noise[i])
    return torch.stack(rows)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("eta", "sigma_hat"), [(0.0, False), (0.5, False), (1.0, False), (1.0, True)]
)
def test_step_is_equation_12(schedule, tensors, prediction, eta, sigma_hat):
    x0, eps, noise = tensors
    x_t, outputs = _forward(schedule, x0, eps, INDICES)
    table = schedule.ddim_table(INDICES, eta, sigma_hat)
    x_s, pred_x0 = ddim_step(
        x_t,
        outputs[prediction],
        torch.arange(5),
        table,
        prediction=prediction,
        clip=False,
        noise=noise,
        return_pred_x0=True,
    )
    # Coefficients rounded to float32, 6e-8 each, of terms up to 4, amplified by 1/sqrt(abar) = 160
    # (eps) and 1/c0 = 7,800 (mean) at t = 999.
    atol = 2 * 4 * 6e-8 * {"eps": 160, "x0": 1, "v": 1, "mean": 7800}[prediction]
    torch.testing.assert_close(pred_x0, x0, rtol=1e-6, atol=atol)
    expected = _equation_12(schedule, INDICES, x0, eps, noise, eta, sigma_hat)
    # At t = 3 eps from x0 is amplified by 1/s = 50, then scaled by at most s again.
    torch.testing.assert_close(x_s, expected, rtol=1e-6, atol=atol + 1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_sigma_and_direction_do_not_cancel(eta):
    # abar within 1e-9 of 1: 1 - abar_s - sigma^2 by subtraction would have 7 digits at best.
    schedule = NoiseSchedule(torch.full((20,), 1e-9, dtype=torch.float64))
    indices = [0, 4, 9, 19]
    table = schedule.ddim_table(indices, eta).double()
    noise = 1e-9 * torch.tensor([0, 1, 5, 10, 20], dtype=torch.float64)  # 1 - abar, to 1e-8
    noise_s, noise_t = noise[:-1], noise[1:]
    sigma2 = eta**2 * noise_s / noise_t * (noise_t - noise_s)
    torch.testing.assert_close(table[:, StepColumn.SIGMA], sigma2.sqrt(), rtol=2e-7, atol=0)
    torch.testing.assert_close(
        table[:, StepColumn.COEF_EPS], (noise_s - sigma2).sqrt(), rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("use_clipped", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_clipping(schedule, tensors, use_clipped, prediction):
    x0, eps, noise = tensors
    x_t, outputs = _forward(schedule, x0, eps, INDICES)
    x_s, pred_x0 = ddim_step(
        x_t,
        outputs[prediction],
        torch.arange(5),
        schedule.ddim_table(INDICES, 0.5),
        prediction=prediction,
        use_clipped_model_output=use_clipped,
        noise=noise,
        return_pred_x0=True,
    )
    clipped = x0.clamp(-1, 1)
    assert float((clipped - x0).abs().max()) > 0.5
    if use_clipped:
        a = _column(schedule.sqrt_alpha_bars[INDICES])
        eps = (x_t - a * clipped) / _column(schedule.sqrt_one_minus_alpha_bars[INDICES])
    expected = _equation_12(schedule, INDICES, clipped, eps, noise, 0.5, False)
    torch.testing.assert_close(pred_x0, clipped, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(x_s, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("use_clipped", [False, True])
def test_step_agrees_with_diffusers(schedule, tensors, eta, prediction, use_clipped):
    diffusers = pytest.importorskip("diffusers")
    # "leading" with S dividing T: the spacing whose previous timestep diffusers gets right.
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=T,
        beta_schedule="linear",
        clip_sample=True,
        prediction_type=prediction,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(50)
    indices = list(range(0, T, 20))
    assert scheduler.timesteps.tolist() == indices[::-1]
    table = schedule.ddim_table(indices, eta)
    x0, eps, noise = (x[:1].float() for x in tensors)
    name = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[prediction]
    for row in (0, 1, 25, 49):
        x_t, outputs = _forward(schedule, x0, eps, [indices[row]])
        x_t, output = x_t.float(), outputs[name].float()
        theirs = scheduler.step(
            output,
            indices[row],
            x_t,
            eta=eta,
            use_clipped_model_output=use_clipped,
            variance_noise=noise,
        )
        ours, pred_x0 = ddim_step(
            x_t,
            output,
            torch.tensor([row]),
            table,
            prediction=name,
            use_clipped_model_output=use_clipped,
            noise=noise,
            return_pred_x0=True,
        )
        # Their float32 cumulative products are off by up to 2e-4 in 1 - abar at small t, and by
        # some 1e-5 elsewhere; 1/sqrt(abar) = 160 amplifies that.
        torch.testing.assert_close(pred_x0, theirs.pred_original_sample, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-3, atol=1e-3)


def test_guidance_combines_the_outputs(schedule, tensors):
    x0, cond, uncond = tensors
    x_t, _ = _forward(schedule, x0, cond, INDICES)
    table, step = schedule.ddim_table(INDICES), torch.arange(5)
    guided = ddim_step(x_t, cond, step, table, uncond=uncond, guidance_scale=3.0)
    expected = ddim_step(x_t, uncond + 3 * (cond - uncond), step, table)
    torch.testing.assert_close(guided, expected)
    assert float((guided - ddim_step(x_t, cond, step, table)).abs().max()) > 0.1


def test_a_learned_variance_is_not_taken_for_a_prediction(schedule, tensors):
    x0, eps, other = tensors
    x_t, _ = _forward(schedule, x0, eps, INDICES)
    table, step = schedule.ddim_table(INDICES), torch.arange(5)
    both = torch.cat([eps, other], 1)
    assert torch.equal(ddim_step(x_t, both, step, table), ddim_step(x_t, eps, step, table))


def test_seed_is_its_noise(schedule, tensors):
    x0, eps, _ = tensors
    x_t, _ = _forward(schedule, x0, eps, INDICES)
    x_t, table, step = x_t.float(), schedule.ddim_table(INDICES, 1.0), torch.arange(5)
    noise = ops.philox_normal(SHAPE, 11, stream=4)
    seeded = ddim_step(x_t, eps, step, table, seed=11, stream=4)
    # The backends' normals agree to a few float32 ulps.
    torch.testing.assert_close(seeded, ddim_step(x_t, eps, step, table, noise=noise))


def test_bf16_is_rounded_once(schedule, tensors):
    x0, eps, noise = tensors
    x_t, _ = _forward(schedule, x0, eps, INDICES)
    args = [x.to(torch.bfloat16) for x in (x_t, eps, noise)]
    table, step = schedule.ddim_table(INDICES, 0.5), torch.arange(5)
    half = ddim_step(args[0], args[1], step, table, noise=args[2])
    wide = ddim_step(args[0].float(), args[1].float(), step, table, noise=args[2].float())
    assert torch.equal(half, wide.to(torch.bfloat16))


def test_zero_terminal_snr_with_v_prediction(tensors):
    schedule = NoiseSchedule.linear(T).rescale_zero_terminal_snr()
    x0, eps, _ = tensors
    x_t, outputs = _forward(schedule, x0, eps, INDICES)
    x_s, pred_x0 = ddim_step(
        x_t,
        outputs["v"],
        torch.arange(5),
        schedule.ddim_table(INDICES),
        prediction="v",
        clip=False,
        return_pred_x0=True,
    )
    torch.testing.assert_close(pred_x0, x0, rtol=1e-6, atol=1e-6)
    expected = _equation_12(schedule, INDICES, x0, eps, torch.zeros_like(x0), 0.0, False)
    torch.testing.assert_close(x_s, expected, rtol=1e-6, atol=1e-6)


def test_encode_table_inverts_the_decoding_update(schedule, tensors):
    """With the same eps at both ends of a step, encoding and decoding cancel (eq. 13)."""
    x0, eps, _ = tensors
    decode, encode = schedule.ddim_table(INDICES), schedule.ddim_encode_table(INDICES)
    step = torch.arange(5)
    previous = [1.0, *schedule.alpha_bars[INDICES[:-1]].tolist()]
    x_s = _column(previous).sqrt() * x0 + (1 - _column(previous)).sqrt() * eps
    x_t = ddim_step(x_s, eps, step, encode, clip=False)
    torch.testing.assert_close(x_t, _forward(schedule, x0, eps, INDICES)[0], rtol=1e-6, atol=1e-6)
    back = ddim_step(x_t, eps, step, decode, clip=False)
    torch.testing.assert_close(back, x_s, rtol=1e-5, atol=2e-4)  # 1/sqrt(abar) = 160
    assert encode[:, StepColumn.TIMESTEP].tolist() == [0, *INDICES[:-1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "noise"}, "unknown prediction 'noise'; choose from eps, x0, v, mean"),
        ({"model_output": torch.zeros(5, 3, 4, 4)}, r"model_output has shape \(5, 3, 4, 4\)"),
        ({"uncond": torch.zeros(1, 2, 4, 4)}, r"uncond has shape \(1, 2, 4, 4\)"),
        ({"step": torch.zeros(5)}, "step has shape"),
        ({"step": torch.zeros(4, dtype=torch.int64)}, r"expected \(5,\) int64"),
        ({"table": torch.zeros(5, 3)}, r"expected \(S, 16\)"),
        ({"noise": torch.zeros(5)}, r"noise has shape \(5,\)"),
        ({"noise": torch.zeros(SHAPE), "seed": 0}, "either noise or seed"),
        ({"x_t": torch.zeros(SHAPE, dtype=torch.int64)}, "x_t has shape"),
    ],
)
def test_bad_arguments(schedule, options, message):
    arguments = {
        "x_t": torch.zeros(SHAPE),
        "model_output": torch.zeros(SHAPE),
        "step": torch.arange(5),
        "table": schedule.ddim_table(INDICES),
    }
    with pytest.raises(ValueError, match=message):
        ddim_step(**{**arguments, **options})


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta(schedule, eta):
    with pytest.raises(ValueError, match="eta is"):
        schedule.ddim_table(INDICES, eta)
    with pytest.raises(ValueError, match="sigma_hat=True goes with eta=1"):
        schedule.ddim_table(INDICES, 0.5, sigma_hat=True)
