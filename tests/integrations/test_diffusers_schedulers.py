"""Our schedulers give what diffusers' give, to the rounding of diffusers' own float32 code."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

from fastdiff.integrations import diffusers as ours  # noqa: E402

SHAPE = (2, 3, 4, 4)
U = torch.finfo(torch.float32).eps / 2
PAIRS = {
    "DDPM": (ours.DDPMScheduler, diffusers.DDPMScheduler),
    "DDIM": (ours.DDIMScheduler, diffusers.DDIMScheduler),
}


def random_case(seed):
    """A random configuration, number of steps, and options of `step`."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[rng.integers(len(values))]

    kind = pick("DDPM", "DDIM")
    num = pick(10, 100, 1000)
    config = {
        "num_train_timesteps": num,
        "beta_schedule": pick("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": pick("epsilon", "sample", "v_prediction"),
        "timestep_spacing": pick("leading", "linspace", "trailing"),
        "clip_sample": pick(True, True, False),
        "clip_sample_range": pick(1.0, 1.0, 0.5),
        "thresholding": pick(False, False, False, True),
        "sample_max_value": pick(1.0, 1.5),
        "rescale_betas_zero_snr": pick(False, False, True),
    }
    options = {}
    if kind == "DDPM":
        config["variance_type"] = pick(
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range",
            "learned", "other",
        )  # fmt: skip
    else:
        config["set_alpha_to_one"] = pick(True, False)
        options = {"eta": pick(0.0, 0.3, 1.0), "use_clipped_model_output": pick(True, False)}
    if config["timestep_spacing"] == "leading" and num > 10:
        config["steps_offset"] = pick(0, 1)
    return kind, config, pick(1, 2, 3, 7, 10), options


def inputs(scheduler, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(SHAPE, generator=generator)
    channels = 6 if scheduler.config.get("variance_type") in ("learned_range", "learned") else 3
    output = torch.randn(2, channels, 4, 4, generator=generator)
    if scheduler.config.get("variance_type") == "learned":  # a variance there, so positive
        output[:, 3:] = output[:, 3:].abs()
    return sample.to(dtype), output.to(dtype)


def make(cls, config, steps, wide=False):
    scheduler = cls(**config)
    scheduler.set_timesteps(steps)
    if wide:  # diffusers' code then computes in float64 from the same float32 table
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        if hasattr(scheduler, "final_alpha_cumprod"):
            scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        else:
            scheduler.one = scheduler.one.double()
    return scheduler


def run(scheduler, t, sample, output, options, wide=False):
    """x_s, pred_x0 and the generator's state after it; noise is drawn in float32."""
    generator = torch.Generator().manual_seed(7)
    if wide:
        sample, output = sample.double(), output.double()
        options = dict(options)
        noise = torch.randn(SHAPE, generator=generator).double()
        # The names of the noise differ: an argument in DDIM, drawn inside in DDPM.
        with pytest.MonkeyPatch.context() as patch:
            for module in ("scheduling_ddpm", "scheduling_ddim"):
                patch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *a, **k: noise)
            return scheduler.step(output, t, sample, return_dict=False, **options)
    result = scheduler.step(output, t, sample, generator=generator, return_dict=False, **options)
    return *result, generator.get_state()


def diffusers_is_wrong(kind, scheduler, t, options):
    """The documented exceptions."""
    timesteps = scheduler.timesteps.tolist()
    is_last = t == timesteps[-1]
    config = scheduler.config
    if kind == "DDPM":
        variance = config.variance_type
        return (is_last and t > 0) or (variance == "fixed_large_log" and t > 0)
    previous = -1 if is_last else timesteps[timesteps.index(t) + 1]
    assumed = t - config.num_train_timesteps // scheduler.num_inference_steps
    return max(assumed, -1) != previous


def magnitudes(scheduler, t, x, out):
    """Sizes of the terms that x0 and x_s are sums of, which rounding errors are relative to."""
    timesteps = scheduler.timesteps.tolist()
    a = scheduler.alphas_cumprod[t].double().sqrt()
    following = timesteps[timesteps.index(t) + 1 :]
    a_s = scheduler.alphas_cumprod[following[0]].double().sqrt() if following else 1.0
    x0 = (x.abs().max() + out.abs().max()).double()
    if scheduler.config.prediction_type == "epsilon":
        x0 = x0 / a
    # x0 enters x_s with at most sqrt(abar_s), once itself and once in eps.
    return x0, 2 * a_s * x0 + x.abs().max() + out.abs().max() + 5


def assert_as_close_as_diffusers(mine, theirs, exact, magnitude):
    """Ours and theirs differ by no more than the roundings of theirs, whose coefficients cancel
    (so `exact` is needed), and a dozen of ours.

    With eta = 1 and abar = 0, 1 - abar_s - sigma^2 is 0, and its root NaN if a machine rounds it
    below: there ours is held to `exact` alone.
    """
    assert not (theirs.isfinite() & ~mine.isfinite()).any()
    lost = mine.isfinite() & ~theirs.isfinite()
    if lost.any():
        assert exact[lost].isfinite().all()
        assert (mine[lost].double() - exact[lost].double()).abs().max() <= 12 * U * magnitude
    finite = exact.isfinite() & theirs.isfinite()
    if finite.any():
        mine, theirs, exact = (x.double()[finite] for x in (mine, theirs, exact))
        bound = 2 * (theirs - exact).abs().max() + 12 * U * magnitude
        assert (mine - theirs).abs().max() <= bound


@pytest.mark.parametrize("block", range(10))
def test_200_random_configurations(block, monkeypatch):
    fused = []
    for name in ("ddpm_step", "ddim_step"):
        op = getattr(ours, name)
        monkeypatch.setattr(ours, name, lambda *a, op=op, **k: fused.append(1) or op(*a, **k))
    for seed in range(20 * block, 20 * block + 20):
        kind, config, steps, options = random_case(seed)
        ours_class, theirs_class = PAIRS[kind]
        mine, theirs = make(ours_class, config, steps), make(theirs_class, config, steps)
        exact = make(theirs_class, config, steps, wide=True)
        buggy = make(ours_class, config, steps)
        buggy.bug_compatible = True
        assert torch.equal(mine.timesteps, theirs.timesteps)
        for t in theirs.timesteps.tolist():
            x, out = inputs(theirs, 100 * seed + t)
            x_s, x0, state = run(theirs, t, x, out, options)
            expected, expected_x0 = run(exact, t, x, out, options, wide=True)
            x0_magnitude, x_s_magnitude = magnitudes(theirs, t, x, out)
            schedulers = [buggy]
            if not diffusers_is_wrong(kind, theirs, t, options):
                schedulers.append(mine)
            for scheduler in schedulers:
                my_x_s, my_x0, my_state = run(scheduler, t, x, out, options)
                assert_as_close_as_diffusers(my_x0, x0, expected_x0, x0_magnitude)
                assert_as_close_as_diffusers(my_x_s, x_s, expected, x_s_magnitude)
                assert torch.equal(my_state, state)
    assert len(fused) >= 10


def ddim_oracle(abar_t, abar_s, x, eps):
    """DDIM eq. 12 with eta = 0 and no clipping, in float64."""
    abar_t, abar_s, x, eps = (
        torch.as_tensor(v, dtype=torch.float64) for v in (abar_t, abar_s, x, eps)
    )
    x0 = (x - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    return abar_s.sqrt() * x0 + (1 - abar_s).sqrt() * eps


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 7)])
def test_ddim_previous_timestep(spacing, steps, dynamic):
    """x_t of one known image and noise: a step must lead to its x_s, for the s that comes next.
    With dynamic thresholding the step runs in diffusers' code."""
    config = {"timestep_spacing": spacing, "clip_sample": False, "thresholding": dynamic}
    mine, theirs = (make(cls, config, steps) for cls in PAIRS["DDIM"])
    x0 = torch.rand(SHAPE) * 2 - 1
    noise = torch.randn(SHAPE)
    timesteps = theirs.timesteps
    errors = {"mine": 0.0, "theirs": 0.0}
    for t, s in itertools.pairwise(timesteps[1:]):
        x_t, x_s = (theirs.add_noise(x0, noise, u[None].expand(2)) for u in (t, s))
        for name, scheduler in (("mine", mine), ("theirs", theirs)):
            out = scheduler.step(noise, t, x_t).prev_sample
            errors[name] = max(errors[name], (out - x_s).abs().max().item())
        abar = theirs.alphas_cumprod.double()
        if not dynamic:
            assert (ddim_oracle(abar[t], abar[s], x_t, noise) - x_s).abs().max() < 1e-4
        mine.bug_compatible = True
        assert torch.equal(
            mine.step(noise, t, x_t).prev_sample, theirs.step(noise, t, x_t).prev_sample
        )
        mine.bug_compatible = False
    assert errors["mine"] < 1e-4
    assert errors["theirs"] > 1e-3


def test_no_noise_in_the_last_step():
    config = {"timestep_spacing": "trailing", "variance_type": "fixed_large"}
    mine, theirs = (make(cls, config, 10) for cls in PAIRS["DDPM"])
    t = theirs.timesteps[-1]
    assert t == 99
    x, out = inputs(theirs, 0)
    result = mine.step(out, t, x)
    # Before the first timestep abar is 1: what is left is the predicted image.
    torch.testing.assert_close(result.prev_sample, result.pred_original_sample)
    # Noise of standard deviation sqrt(1 - abar) = 0.32 there, in 96 samples.
    assert (run(theirs, t, x, out, {})[0] - result.prev_sample).std() > 0.2
    mine.bug_compatible = True
    a, b = (run(scheduler, t, x, out, {})[0] for scheduler in (mine, theirs))
    assert torch.equal(a, b)


@pytest.mark.parametrize("thresholding", [False, True])
def test_fixed_large_log_is_a_variance(thresholding):
    config = {"variance_type": "fixed_large_log", "thresholding": thresholding}
    mine, theirs = (make(cls, config, 10) for cls in PAIRS["DDPM"])
    large = make(diffusers.DDPMScheduler, {**config, "variance_type": "fixed_large"}, 10)
    x, out = inputs(theirs, 0)
    t = theirs.timesteps[3]
    assert run(theirs, t, x, out, {})[0].isnan().all()
    torch.testing.assert_close(run(mine, t, x, out, {})[0], run(large, t, x, out, {})[0])
    mine.bug_compatible = True
    assert run(mine, t, x, out, {})[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_coefficients(name, dtype):
    """The float64 value, rounded once; diffusers' table in half precision is off by far more."""
    mine, theirs = (cls() for cls in PAIRS[name])
    abar = theirs.alphas_cumprod.double()
    t = torch.arange(0, 1000, 7)
    x0 = (torch.rand(len(t), 3, 2, 2) * 2 - 1).to(dtype)
    noise = torch.randn(len(t), 3, 2, 2).to(dtype)
    a, s = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
    u = torch.finfo(dtype).eps / 2
    for method, args, exact in (
        ("add_noise", (x0, noise, t), a * x0 + s * noise),
        ("get_velocity", (x0, noise, t), a * noise - s * x0),
    ):
        got, their = (getattr(scheduler, method)(*args) for scheduler in (mine, theirs))
        assert got.dtype == their.dtype == dtype
        bound = u * exact.abs() + 4 * U * (x0.abs() + noise.abs()) + torch.finfo(dtype).tiny
        assert ((got - exact).abs() <= bound).all()
        assert not ((their - exact).abs() <= 4 * bound).all()
        mine.bug_compatible = True
        assert torch.equal(getattr(mine, method)(*args), their)
        mine.bug_compatible = False
    if dtype == torch.bfloat16:
        first = torch.zeros(2, dtype=torch.int64)
        assert torch.equal(theirs.add_noise(x0[:2], noise[:2], first), x0[:2])  # no noise at all
        assert not torch.equal(mine.add_noise(x0[:2], noise[:2], first), x0[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_step_rounds_once(name, dtype, monkeypatch):
    mine, theirs = (make(cls, {}, 10) for cls in PAIRS[name])
    exact = make(PAIRS[name][1], {}, 10, wide=True)
    noise = torch.zeros(SHAPE, dtype=dtype)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: noise)
    monkeypatch.setattr(ours, "randn_tensor", lambda *a, **k: noise)
    for t in theirs.timesteps.tolist():
        x, out = inputs(theirs, t, dtype)
        x_s = exact.step(out.double(), t, x.double()).prev_sample
        result = mine.step(out, t, x).prev_sample
        assert result.dtype == dtype
        magnitude = magnitudes(theirs, t, x.float(), out.float())[1]
        bound = torch.finfo(dtype).eps / 2 * x_s.abs() + 12 * U * magnitude
        assert ((result - x_s).abs() <= bound).all()


@pytest.mark.parametrize("name", PAIRS)
def test_add_noise_and_velocity_like_diffusers(name):
    mine, theirs = (cls(beta_schedule="squaredcos_cap_v2") for cls in PAIRS[name])
    x0, noise = torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    cases = [
        (x0, noise, torch.tensor([0, 999])),
        (x0, noise, torch.tensor([3, 4], dtype=torch.int32)),
        (x0, noise, torch.tensor([17])),
        (x0, noise, torch.tensor(17)),
        (x0.contiguous(memory_format=torch.channels_last), noise, torch.tensor([1, 2])),
        (x0.double(), noise.double(), torch.tensor([1, 2])),
        (x0.half(), noise, torch.tensor([500, 600])),  # promoted
        (x0, noise[:1], torch.tensor([5, 5])),  # broadcast: diffusers' code
        (x0[:0], noise[:0], torch.tensor([], dtype=torch.int64)),
    ]
    for arguments in cases:
        for method in ("add_noise", "get_velocity"):
            a, b = (getattr(scheduler, method)(*arguments) for scheduler in (mine, theirs))
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            tolerance = 2e-3 if arguments[0].dtype == torch.half else 8 * U * 5
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


class NoReads(TorchDispatchMode):
    """Raises on operations that wait for a device: reading a value, looking for one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("name", PAIRS)
def test_steps_wait_for_no_device(name):
    mine, theirs = (make(cls, {}, 10) for cls in PAIRS[name])
    x, out = inputs(mine, 0)
    mine.step(out, mine.timesteps[0], x)
    with NoReads():
        for t in mine.timesteps:
            mine.step(out, t, x)
        mine.add_noise(x, out, torch.tensor([1, 2]))
    if name == "DDPM":  # the detector detects
        with pytest.raises(AssertionError, match="nonzero"), NoReads():
            theirs.step(out, theirs.timesteps[1], x)


def test_what_a_change_of_the_scheduler_changes():
    mine, theirs = (make(cls, {}, 10) for cls in PAIRS["DDIM"])
    x, out = inputs(mine, 0)
    for change in ("steps", "betas in place", "betas", "device move"):
        for scheduler in (mine, theirs):
            if change == "steps":
                scheduler.set_timesteps(5)
            elif change == "betas in place":
                scheduler.alphas_cumprod.mul_(0.9)
            elif change == "betas":
                scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
            else:
                scheduler.alphas_cumprod = scheduler.alphas_cumprod.to("cpu", copy=True)
        a, b = (s.step(out, s.timesteps[2], x).prev_sample for s in (mine, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        t = torch.tensor([1, 2])
        a, b = (s.add_noise(x, out, t) for s in (mine, theirs))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PAIRS)
def test_errors_and_copies(name):
    mine = make(PAIRS[name][0], {}, 10)
    x, out = inputs(mine, 0)
    t = mine.timesteps[4]
    expected = run(mine, t, x, out, {})[0]
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert type(other) is type(mine)
        assert torch.equal(run(other, t, x, out, {})[0], expected)
    with pytest.raises(RuntimeError):
        mine.step(out[:, :2], t, x)
    with torch.inference_mode():
        mine.set_timesteps(10)
        assert torch.equal(run(mine, t, x, out, {})[0], expected)
    if name == "DDIM":
        unset = ours.DDIMScheduler()
        with pytest.raises(ValueError, match="set_timesteps"):
            unset.step(out, 3, x)
        generator = torch.Generator()
        with pytest.raises(ValueError, match="variance_noise"):
            mine.step(out, t, x, eta=1.0, generator=generator, variance_noise=x)
        variance = torch.cat([out, out], dim=1)  # a learned-variance network's output
        torch.testing.assert_close(mine.step(variance, t, x)[0], mine.step(out, t, x)[0])
