"""What all samplers share: noise per sample, callbacks, guidance, modes, errors (Math §7, §9)."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdiff
from fastdiff import ops
from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.diffusion.guidance import ClassifierFree
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.samplers import (
    DDIM,
    DDPM,
    AnnealedLangevin,
    DPMSolverPP,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseSDE,
)

SHAPE = (6, 2, 4, 4)
SAMPLERS = {
    "ddpm": lambda diffusion, **kw: DDPM(diffusion, 5, "trailing", **kw),
    "ddim": lambda diffusion, **kw: DDIM(diffusion, 5, spacing="trailing", **kw),
    "ddim_eta": lambda diffusion, **kw: DDIM(diffusion, 5, 0.8, "trailing", **kw),
    "probability_flow": lambda diffusion, **kw: ProbabilityFlow(diffusion, 5, "trailing", **kw),
    "heun": lambda diffusion, **kw: Heun(diffusion, 5, "trailing", **kw),
    "dpm_solver_pp": lambda diffusion, **kw: DPMSolverPP(diffusion, 5, "trailing", **kw),
    "reverse_sde": lambda diffusion, **kw: ReverseSDE(diffusion, 5, "trailing", **kw),
    "langevin": lambda diffusion, **kw: AnnealedLangevin(
        diffusion, 5, "trailing", inner_steps=9, **kw
    ),
    "predictor_corrector": lambda diffusion, **kw: PredictorCorrector(
        diffusion, 5, "trailing", **kw
    ),
}


@pytest.fixture(scope="module")
def diffusion():
    return GaussianDiffusion(NoiseSchedule.linear(50, rescale=True))


def model(x_t, t):
    return 0.9 * x_t * (t.reshape(-1, 1, 1, 1) > 5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_do_not_depend_on_how_the_batch_is_split(diffusion, name):
    sampler = SAMPLERS[name](diffusion)
    whole = sampler.sample(model, SHAPE, seed=3, progress=False)
    keys = ops.sample_keys(3, SHAPE[0])
    parts = [
        sampler.sample(model, (len(k), *SHAPE[1:]), seed=k, progress=False)
        for k in keys.split([1, 2, 3])
    ]
    assert torch.equal(torch.cat(parts), whole)
    first = sampler.sample(model, (2, *SHAPE[1:]), seed=3, progress=False)
    assert torch.equal(first, whole[:2])
    assert not torch.equal(whole, sampler.sample(model, SHAPE, seed=4, progress=False))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_prediction_that_is_not_finite_is_not_clipped_to_a_pixel(name, guided, backend):
    """One bad pixel of one evaluation makes its sample NaN, and no other one."""
    if not fastdiff.backends()[backend]:
        pytest.skip(f"about the {backend} backend")
    options, seen = {"seed": 3, "progress": False}, []
    if guided:
        y = torch.ones(SHAPE[0], dtype=torch.int64)
        options["guidance"] = ClassifierFree(2.0, {"y": torch.zeros_like(y)})
        options["model_kwargs"] = {"y": y}
    cases = [("eps", torch.inf, 49), ("x0", -torch.inf, 19), ("v", torch.inf, 9)]
    for prediction, value, t_bad in cases:
        diffusion = GaussianDiffusion(NoiseSchedule.cosine(50), prediction=prediction)
        sampler = SAMPLERS[name](diffusion)

        def spoiled(x_t, t, y=None, value=value, t_bad=t_bad):
            output = model(x_t, t)
            if t[0] == t_bad and (y is None or y[0] == 0):  # the unconditional one
                output[2, 1, 3, 0] = value
            return output

        seen.clear()
        with fastdiff.use_backend(backend):
            expected = sampler.sample(lambda x, t, y=None: model(x, t), SHAPE, **options)
            x = sampler.sample(
                spoiled, SHAPE, **options, callback=lambda k, t, x, x0: seen.append(x0)
            )
        others = torch.arange(SHAPE[0]) != 2
        assert x[2].isnan().all()
        assert torch.equal(x[others], expected[others])
        assert seen[0][2].isnan().all() == (t_bad == 49)
        assert seen[-1][2].isnan().all()
        assert torch.stack(seen)[:, others].isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_memory_format_changes_nothing_but_strides(diffusion, name):
    sampler = SAMPLERS[name](diffusion)
    x_T = ops.philox_normal(SHAPE, 3)
    plain = sampler.sample(model, x_T=x_T, seed=3, progress=False)
    last = sampler.sample(
        model, x_T=x_T.to(memory_format=torch.channels_last), seed=3, progress=False
    )
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)
    # x_T is stream 0 of the same keys.
    assert torch.equal(plain, sampler.sample(model, SHAPE, seed=3, progress=False))


def test_every_step_draws_its_own_stream(diffusion):
    """With a model that predicts x0 = 0, DDPM's update is linear and can be written out."""
    zero = GaussianDiffusion(diffusion.schedule, prediction="x0")
    spaced = zero.schedule.respace([10, 30, 49])
    x = ops.philox_normal(SHAPE, 8)
    for stream, i in ((1, 2), (2, 1), (3, 0)):
        noise = ops.philox_normal(SHAPE, 8, stream=stream)
        sigma = float(spaced.betas[i].sqrt()) if i else 0.0
        x = float(spaced.posterior_mean_coef_x_t[i]) * x + sigma * noise
    sampler = DDPM(zero, spacing=[10, 30, 49])
    actual = sampler.sample(lambda x, t: torch.zeros_like(x), SHAPE, seed=8, progress=False)
    torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-6)


def test_callback_sees_each_state_with_its_prediction(diffusion):
    seen = []
    sampler = DDIM(diffusion, 4, spacing="trailing")
    x_T = ops.philox_normal(SHAPE, 0)
    x_0 = sampler.sample(
        model,
        x_T=x_T,
        progress=False,
        callback=lambda step, t, x_t, pred_x0: seen.append((step, t, x_t, pred_x0)),
    )
    assert [(step, t) for step, t, *_ in seen] == [(0, 49), (1, 37), (2, 24), (3, 11)]
    assert torch.equal(seen[0][2], x_T)
    for _, t, x_t, pred_x0 in seen:
        times = torch.full((SHAPE[0],), t)
        expected = diffusion.p_mean_variance(model, x_t, times).pred_x0
        torch.testing.assert_close(pred_x0, expected, rtol=1e-5, atol=1e-5)
    # The last step goes to abar = 1, where x_0 is the prediction.
    torch.testing.assert_close(x_0, seen[-1][3])


def test_model_gets_original_timesteps_and_its_arguments(diffusion):
    seen = []

    def spy(x_t, t, y):
        seen.append((t.tolist(), y))
        return x_t

    for process in (diffusion, GaussianDiffusion(diffusion.schedule.respace(range(0, 50, 5)))):
        seen.clear()
        DDPM(process, 2, "trailing").sample(
            spy, (2, 1, 2, 2), model_kwargs={"y": 7}, progress=False
        )
        last = int(process.schedule.timesteps[-1])
        assert seen[0] == ([last] * 2, 7)
        assert len(seen) == 2


def test_classifier_free_guidance(diffusion):
    def conditional(x_t, t, y):
        return 0.5 * x_t + 0.1 * y.reshape(-1, 1, 1, 1)

    y, null = torch.arange(6.0), torch.zeros(6)
    sampler = DDIM(diffusion, 5)
    guided = sampler.sample(
        conditional,
        SHAPE,
        guidance=ClassifierFree(3.0, {"y": null}),
        model_kwargs={"y": y},
        progress=False,
    )
    expected = sampler.sample(conditional, SHAPE, model_kwargs={"y": 3 * y}, progress=False)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)
    calls = []

    def counted(x_t, t, y):
        calls.append(y)
        return conditional(x_t, t, y)

    plain = sampler.sample(
        counted,
        SHAPE,
        guidance=ClassifierFree(1.0, {"y": null}),
        model_kwargs={"y": y},
        progress=False,
    )
    assert len(calls) == 5
    assert torch.equal(
        plain, sampler.sample(conditional, SHAPE, model_kwargs={"y": y}, progress=False)
    )
    with pytest.raises(TypeError, match="expected a mapping"):
        ClassifierFree(2.0, null)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(2)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.modes = []

    def forward(self, x_t, t):
        self.modes.append(self.training or self.dropout.training)
        return self.scale * self.dropout(x_t)


def test_sampling_is_in_eval_mode_and_restores_every_flag(diffusion):
    net = _Net()
    net.frozen.eval()
    sampler = DDIM(diffusion, 3)
    first = sampler.sample(net, SHAPE, progress=False)
    assert net.modes == [False] * 3
    assert net.training
    assert net.dropout.training
    assert not net.frozen.training
    assert torch.equal(first, sampler.sample(net, SHAPE, progress=False))
    assert not first.requires_grad
    net.scale.grad = None
    (net.scale * first.sum()).backward()  # samples may enter a graph afterwards
    assert net.scale.grad is not None


def test_a_failing_model_restores_the_mode(diffusion):
    net = _Net()
    with pytest.raises(TypeError):
        DDIM(diffusion, 3).sample(net, SHAPE, model_kwargs={"y": 0}, progress=False)
    assert net.training


def test_dtype_and_device_follow_x_T_or_the_arguments(diffusion):
    sampler = DDPM(diffusion, 3)
    assert sampler.sample(model, SHAPE, dtype=torch.float64, progress=False).dtype == torch.float64
    x_T = torch.zeros(SHAPE, dtype=torch.bfloat16)
    assert sampler.sample(model, x_T=x_T, progress=False).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_half_precision_model_is_sampled_with_a_float32_state(diffusion, name):
    class Half(nn.Conv2d):  # refuses any dtype but its own
        def forward(self, x_t, t):
            return super().forward(x_t)

    torch.manual_seed(0)
    net = Half(2, 2, 1, dtype=torch.bfloat16)
    sampler = SAMPLERS[name](diffusion)
    samples = sampler.sample(net, SHAPE, seed=3, progress=False)
    assert samples.dtype == torch.float32
    # By hand: only the model's input and output are rounded, not the state.
    expected = sampler.sample(
        lambda x, t: net(x.bfloat16(), t).float(), SHAPE, seed=3, progress=False
    )
    assert torch.equal(samples, expected)


def test_sampling_without_a_seed_follows_torch_manual_seed(diffusion):
    sampler = DDPM(diffusion, 3)
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(sampler.sample(model, SHAPE, seed=None, progress=False))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_never_waits_for_the_device(diffusion, name):
    net = _Net().cuda()
    calls = []

    def forbid_synchronization(step, t, x_t, pred_x0):
        calls.append(x_t.device.type)
        torch.cuda.set_sync_debug_mode("error")

    try:
        samples = SAMPLERS[name](diffusion).sample(
            net, SHAPE, seed=3, progress=False, callback=forbid_synchronization
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == ["cuda"] * 5
    expected = SAMPLERS[name](diffusion).sample(net.cpu(), SHAPE, seed=3, progress=False)
    torch.testing.assert_close(samples.cpu(), expected, rtol=1e-4, atol=1e-4)


class _HostReads(TorchDispatchMode):
    """Counts what brings a value from the device to the host, or a tensor across devices."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        reads = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "_to_cpu")
        if name.removeprefix("aten::") in reads:
            self.seen.append(name)
        out = func(*args, **(kwargs or {}))
        moved = {x.device for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)}
        if len(moved) > 1:
            self.seen.append(f"{name} between {moved}")
        if name.startswith("fastdiff::"):
            self.shapes.add((name, *(x.shape for x in args if isinstance(x, torch.Tensor))))
        return out


def test_host_reads_are_found():
    x = torch.tensor([1.0, 0.0])
    for read in (lambda: float(x[0]), lambda: bool((x > 0).any()), lambda: x.nonzero()):
        with _HostReads() as reads:
            read()
        assert reads.seen


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("guided", [False, True])
def test_the_loop_reads_nothing_on_the_host_and_has_static_shapes(diffusion, name, guided):
    """What a CUDA graph needs: one fused op per step, the same shapes in every one."""
    reads = _HostReads()

    def conditional(x_t, t, y):
        return model(x_t, t) + y

    def enter(step, t, x_t, pred_x0):
        if step == 0:  # after the first step, so that all that happens once is over
            reads.__enter__()

    guidance = ClassifierFree(2.0, {"y": 0.0}) if guided else None
    SAMPLERS[name](diffusion).sample(
        conditional,
        SHAPE,
        seed=3,
        guidance=guidance,
        model_kwargs={"y": 0.1},
        progress=False,
        callback=enter,
    )
    reads.__exit__(None, None, None)
    assert reads.seen == []
    op = "fastdiff::ddpm_step" if name == "ddpm" else "fastdiff::ddim_step"
    names = [op_name for op_name, *_ in reads.shapes]
    if name in ("heun", "dpm_solver_pp", "langevin", "predictor_corrector"):
        assert op in names  # updates of several kinds
    else:
        assert names == [op]


@pytest.mark.parametrize("name", SAMPLERS)
def test_learned_range_models_can_be_sampled_by_all(diffusion, name):
    learned = GaussianDiffusion(diffusion.schedule, variance="learned_range")

    def two_heads(x_t, t):
        return torch.cat([model(x_t, t), torch.ones_like(x_t)], 1)

    samples = SAMPLERS[name](learned).sample(two_heads, SHAPE, progress=False)
    # v = 1 is the large variance.
    expected = SAMPLERS[name](diffusion).sample(model, SHAPE, progress=False)
    torch.testing.assert_close(samples, expected, rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr_samples_are_finite_and_right():
    schedule = NoiseSchedule.cosine(50).rescale_zero_terminal_snr()
    diffusion = GaussianDiffusion(schedule, prediction="v")
    target = torch.linspace(-1, 1, 32).reshape(1, 2, 4, 4)

    def oracle(x_t, t):
        """v of data that is always `target`."""
        a = schedule.sqrt_alpha_bars[t].float().reshape(-1, 1, 1, 1)
        s = schedule.sqrt_one_minus_alpha_bars[t].float().reshape(-1, 1, 1, 1)
        return a * (x_t - a * target) / s - s * target

    for sampler in (DDPM(diffusion, 10, "trailing"), DDIM(diffusion, 10, spacing="trailing")):
        samples = sampler.sample(oracle, SHAPE, progress=False)
        torch.testing.assert_close(samples, target.expand(SHAPE), rtol=0, atol=1e-5)


def test_errors_name_the_argument(diffusion):
    sampler = DDIM(diffusion, 3)
    with pytest.raises(ValueError, match=r"pass shape .* or x_T; neither"):
        sampler.sample(model, progress=False)
    with pytest.raises(ValueError, match=r"x_T has shape \(1, 2\), expected \(1, 3\)"):
        sampler.sample(model, (1, 3), x_T=torch.zeros(1, 2), progress=False)
    with pytest.raises(ValueError, match=r"shape is \(3,\), expected \(B, C"):
        sampler.sample(model, (3,), progress=False)
    with pytest.raises(ValueError, match="the model returned shape"):
        sampler.sample(lambda x, t: x[:, :1], SHAPE, progress=False)
    with pytest.raises(ValueError, match=r"expected 1\.\.50"):
        DDIM(diffusion, 51)
    with pytest.raises(ValueError, match="eta is 2"):
        DDIM(diffusion, 5, eta=2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_predictions_are_written_for_who_reads_them(name, monkeypatch):
    """The same samples with and without a callback; without, no step writes pred_x0 for nobody."""
    asked = []
    for op in ("ddim_step", "ddpm_step"):
        step = getattr(ops, op)

        def spy(*args, step=step, **options):
            asked.append(options["return_pred_x0"])
            return step(*args, **options)

        monkeypatch.setattr(ops, op, spy)
    sampler = SAMPLERS[name](GaussianDiffusion(NoiseSchedule.linear(50)))
    run = partial(sampler.sample, lambda x, t: 0.1 * x, (2, 1, 4, 4), progress=False)
    alone, found = run(), []
    assert any(asked) == sampler.multistep
    asked.clear()
    watched = run(callback=lambda step, t, x_t, pred_x0: found.append(pred_x0))
    assert all(asked)
    assert torch.equal(alone, watched)
    assert len(found) == sampler.steps
    assert all(x0.shape == (2, 1, 4, 4) and x0.isfinite().all() for x0 in found)
