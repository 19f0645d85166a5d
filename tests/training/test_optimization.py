"""Optimizer, loss scale, what is not finite, and how often the loop waits for the device."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from host_waits import CountMethods, CountWaits

from fastdiff.training import RunError, RunFolder, TrainConfig, Trainer
from fastdiff.training.data import ArrayDataset
from fastdiff.training.logging import Metrics
from fastdiff.training.optimization import LossScaler, optimizer

SMALL = TrainConfig(
    preset="tiny",
    steps=8,
    batch_size=4,
    timesteps=50,
    warmup=3,
    log_every=4,
    sample_every=1000,
    checkpoint_every=2,
    num_samples=1,
    sample_steps=1,
    device="cpu",
)
CPU = torch.device("cpu")
DATASET = ArrayDataset(np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8))


def trainer(path, **changes):
    config = dataclasses.replace(SMALL, **changes)
    config.validate()
    folder = RunFolder(path)
    folder.create(config)
    return Trainer(config, DATASET, folder, CPU)


def multiply_gradients(run, factor):
    """Multiply the gradient of one weight, at every step, by ``factor(step)``."""
    run.unet.conv_out.bias.register_hook(lambda gradient: gradient * factor(run.step))


def test_the_optimizer_is_the_one_asked_for():
    """By hand: step 1 of Adam moves by lr against the sign of the gradient."""
    parameter = torch.nn.Parameter(torch.ones(1))
    moved = {}
    for name in ("adamw", "adam"):
        config = dataclasses.replace(
            SMALL, optimizer=name, lr=0.1, beta1=0.5, beta2=0.25, weight_decay=0.5
        )
        made = optimizer(config, [parameter])
        with torch.no_grad():
            parameter.fill_(1.0)
        parameter.grad = torch.tensor([-1.0])
        made.step()
        moved[name] = float(parameter.detach())
    # Decoupled decay first takes lr * 0.5 of the weight; as L2 it only changes the gradient.
    assert moved == pytest.approx({"adamw": 0.95 + 0.1, "adam": 1 + 0.1})
    parameter.grad = torch.tensor([-4.0])
    made.step()
    gradients = -1 + 0.5, -4 + 0.5 * 1.1
    mean = (0.25 * gradients[0] + 0.5 * gradients[1]) / (1 - 0.5**2)
    square = (0.25 * 0.75 * gradients[0] ** 2 + 0.75 * gradients[1] ** 2) / (1 - 0.25**2)
    assert float(parameter.detach()) == pytest.approx(1.1 - 0.1 * mean / math.sqrt(square))


def test_the_loss_scale_halves_doubles_and_stays_within_its_limits():
    scaler = LossScaler(CPU, enabled=True)
    yes, no = torch.tensor(True), torch.tensor(False)
    assert float(scaler.scale) == 65536
    scaler.update(no)
    assert float(scaler.scale) == 32768
    for _ in range(1999):
        scaler.update(yes)
    assert float(scaler.scale) == 32768
    scaler.update(yes)
    assert float(scaler.scale) == 65536
    for _ in range(40):
        scaler.update(no)
    assert float(scaler.scale) == 1
    scaler.scale.fill_(2.0**24)
    for _ in range(2000):
        scaler.update(yes)
    assert float(scaler.scale) == 2.0**24
    idle = LossScaler(CPU, enabled=False)
    idle.update(no)
    assert float(idle.scale) == 1


def test_float16_skips_a_step_that_overflows_and_goes_on(tmp_path):
    run = trainer(tmp_path, amp="fp16", checkpoint_every=1000)
    weights = {}

    def watch():
        weights[run.step] = run.unet.conv_in.weight.detach().clone()
        return False

    multiply_gradients(run, lambda step: math.inf if step == 5 else 1.0)
    assert run.train(should_stop=watch)
    assert not torch.equal(weights[4], weights[5])
    assert torch.equal(weights[5], weights[6])
    assert not torch.equal(weights[6], weights[7])
    assert [entry["loss_scale"] for entry in run.metrics.entries] == [65536, 32768]
    assert all(math.isfinite(entry["grad_norm"]) for entry in run.metrics.entries)

    plain = trainer(tmp_path / "float32", checkpoint_every=1000)
    assert plain.train()
    # Forward passes in float16 (eps 1e-3) of the same steps.
    first = run.metrics.entries[0], plain.metrics.entries[0]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-2)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-1)


def test_float16_that_always_overflows_ends_with_the_step_and_the_scale(tmp_path):
    run = trainer(tmp_path, amp="fp16", steps=100)
    multiply_gradients(run, lambda step: math.inf if step >= 4 else 1.0)
    # From 2^16 the scale is 1 after 16 steps; the step after those may not overflow.
    with pytest.raises(
        RunError, match=r"step 21: .* is (inf|nan) in float16 .* loss scale, 1 \(--amp bf16"
    ):
        run.train()
    assert all(bool(parameter.isfinite().all()) for parameter in run.parameters)


def test_a_passing_fault_is_healed_by_going_back_once(tmp_path, capsys):
    clean = trainer(tmp_path / "clean")
    assert clean.train()
    for where in ("batch", "weight", "gradient"):
        run = trainer(tmp_path / where)
        faults = [5]

        def fault(run=run, faults=faults):
            if run.step in faults:
                faults.clear()
                return True
            return False

        def poison(run=run, fault=fault):
            if fault():
                with torch.no_grad():
                    run.unet.conv_in.weight.fill_(math.nan)
            return False

        def spoil(module, args, fault=fault):
            return (args[0] * (math.nan if fault() else 1.0), *args[1:])

        if where == "batch":
            run.unet.register_forward_pre_hook(spoil)
        if where == "gradient":
            multiply_gradients(run, lambda step, fault=fault: math.nan if fault() else 1.0)
        assert run.train(should_stop=poison if where == "weight" else lambda: False)
        assert not faults
        message = capsys.readouterr().err
        assert "step 6: the " in message
        assert "going back to step 4 to repeat those steps once" in message
        for name, value in clean.unet.state_dict().items():
            assert torch.equal(run.unet.state_dict()[name], value), name
        assert [e["step"] for e in run.metrics.entries] == [
            e["step"] for e in clean.metrics.entries
        ]


def formats_of(run):
    """What the convolutions of a step work on: (dtype of the output, whether in channels_last)."""
    seen = set()

    def look(module, args, output):
        if min(output.shape[1:]) > 1:  # else both formats are the same
            last = output.is_contiguous(memory_format=torch.channels_last)
            seen.add((output.dtype, last))

    for module in run.unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(look)
    return seen


# Roundings of activations (eps 2^-9) and of sums in another order (2^-24), some 40 of each.
@pytest.mark.parametrize(
    ("changes", "dtype", "last", "rounding"),
    [
        ({"amp": "bf16"}, torch.bfloat16, False, 2e-2),
        ({"channels_last": True}, torch.float32, True, 1e-5),
        ({"amp": "bf16", "channels_last": True}, torch.bfloat16, True, 2e-2),
        pytest.param({"compile": True}, None, None, 1e-5, marks=pytest.mark.slow),
        pytest.param(
            {"compile": True, "self_conditioning": True}, None, None, 1e-5, marks=pytest.mark.slow
        ),
    ],
)
def test_another_way_to_compute_changes_roundings_alone(tmp_path, changes, dtype, last, rounding):
    if "compile" in changes:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    losses = {}
    same = {name: changes[name] for name in changes if name == "self_conditioning"}
    for name, extra in (("plain", {}), ("other", changes)):
        run = trainer(tmp_path / name, steps=4, log_every=1, **{**same, **extra})
        seen = set() if run.config.compile else formats_of(run)
        assert run.train(should_stop=lambda run=run: run.step == 3) is False
        losses[name] = [entry["loss"] for entry in run.metrics.entries]
        assert all(parameter.dtype == torch.float32 for parameter in run.parameters)
    assert losses["other"] == pytest.approx(losses["plain"], rel=rounding)
    if run.config.compile:
        # One for a pass without an estimate; for one that makes it; for one that is given it.
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == (3 if run.config.self_conditioning else 1)
    else:
        assert seen == {(dtype, last)}


BY_LOSS = {"timestep_sampler": "loss_second_moment", "loss": "kl", "variance": "learned_range"}


@pytest.mark.cpu_kernels
@pytest.mark.parametrize(
    "changes",
    [{}, {"amp": "fp16", "grad_accum": 2, "flip": True}, BY_LOSS, {"self_conditioning": True}],
)
def test_the_device_is_waited_for_once_per_log_interval(tmp_path, changes):
    run = trainer(tmp_path, **changes)
    run.metrics = Metrics(tmp_path / "metrics.jsonl", last_step=0)
    images = torch.from_numpy(DATASET.images[:4])
    run._train_step(images, None)  # the optimizer's state is made
    run._restart_clock()
    with CountWaits() as waits, CountMethods(waits.seen):
        for _ in range(3):
            run._train_step(images, None)
        assert waits.seen == []
        run._flush()
    assert waits.seen == ["tolist"]
    assert run.metrics.entries[0]["step"] == 4


def test_waits_are_seen():
    x = torch.ones(3)
    with CountWaits() as waits, CountMethods(waits.seen):
        x.sum().item()
        x[x > 0]
        x.cpu()
    assert waits.seen == ["item", "aten::_local_scalar_dense", "aten::index", "cpu"]
