"""The loop: what it draws, continues, writes and refuses."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from training.runs import SMALL, resumed, trainer

from fastdiff.images import image_grid, to_uint8
from fastdiff.training import RunError, load_run
from fastdiff.training.checkpoint import load_newest
from fastdiff.training.data import ArrayDataset


def everything(trainer):
    """All state of a run, as a flat dict of tensors."""
    tensors = {f"model.{name}": value for name, value in trainer.unet.state_dict().items()}
    for ema in trainer.emas:
        average = ema.model.state_dict()
        tensors |= {f"ema.{ema.decay}.{name}": value for name, value in average.items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors |= {f"timesteps.{k}": value for k, value in trainer.timesteps.state_dict().items()}
    tensors["counters"] = torch.tensor([trainer.step, trainer.emas[-1].num_updates])
    return tensors


# Of 4 timesteps every one has been seen often enough, at the half-way, to be drawn by its losses.
BY_LOSS = {
    "timestep_sampler": "loss_second_moment",
    "timesteps": 4,
    "loss": "kl",
    "variance": "learned_range",
    "batch_size": 16,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_accum": 2, "ema": (0.9, 0.5), "self_conditioning": True},
        {"channels_last": True},
        BY_LOSS,
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(tmp_path, dataset, changes):
    whole = trainer(tmp_path / "whole", dataset, **changes)
    assert whole.train()
    expected = everything(whole)

    part = trainer(tmp_path / "part", dataset, **changes)
    assert not part.train(should_stop=lambda: part.step == 5)
    assert part.step == 5
    torch.manual_seed(123)  # a new process has other random states
    again = resumed(tmp_path / "part", dataset, **changes)
    assert again.step == 5
    assert again.train()

    actual = everything(again)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    pictures = [
        path / "samples/step-00000012.png" for path in (tmp_path / "whole", again.folder.path)
    ]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_checkpoint_of_a_version_with_random_states_is_read(tmp_path, dataset):
    """They were dropout's, whose masks now belong to the images."""
    part = trainer(tmp_path, dataset)
    assert not part.train(should_stop=lambda: part.step == 5)
    checkpoint = load_newest(part.folder.checkpoints, pytest.fail)
    checkpoint.state["random"] = {"cpu": [torch.get_rng_state()]}
    again = trainer(tmp_path, dataset, resume=True)
    again.restore(checkpoint)
    assert again.step == 5


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_in_another_memory_format(tmp_path, dataset, first):
    """Its optimizer's state follows: fused kernels take the order of elements for granted."""
    whole = trainer(tmp_path / "whole", dataset)
    assert whole.train()
    part = trainer(tmp_path / "part", dataset, channels_last=first)
    part.train(should_stop=lambda: part.step == 6)
    again = resumed(tmp_path / "part", dataset, channels_last=not first)
    assert again.train()
    moved = whole.unet.conv_in.weight - part.unet.conv_in.weight
    for name, value in whole.unet.state_dict().items():
        # Roundings of 12 steps; with moments in the wrong places, as far apart as weights moved.
        apart = (again.unet.state_dict()[name] - value).abs().max()
        assert apart < 0.02 * moved.abs().max(), name


def test_the_gradient_does_not_depend_on_how_a_batch_is_split(tmp_path, dataset):
    """Timesteps, noise, flips and dropped labels belong to images, not to micro-batches."""
    norms = []
    for accum in (1, 2, 8):
        one = trainer(tmp_path / str(accum), dataset, grad_accum=accum, steps=1)
        one.train()
        norms.append(one.metrics.entries[0]["grad_norm"])
        assert one.metrics.entries[0]["loss"] > 0.1
    # Sums of 8 images' gradients in another order: a few float32 roundings (eps 1.2e-7).
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[2] == pytest.approx(norms[0], rel=1e-5)


def test_half_of_the_steps_are_conditioned_on_an_estimate(tmp_path, dataset):
    conditioned = {}
    for accum in (1, 2):
        run = trainer(
            tmp_path / str(accum),
            dataset,
            self_conditioning=True,
            steps=60,
            log_every=60,
            batch_size=2,
            grad_accum=accum,
        )
        seen = conditioned[accum] = {}

        def watch(module, args, kwargs, run=run, seen=seen):
            seen.setdefault(run.step, []).append("x_self_cond" in kwargs)

        hook = run.unet.register_forward_pre_hook(watch, with_kwargs=True)
        run.train(should_stop=lambda run=run: run.step == 40)
        hook.remove()
    # The estimate's own pass comes before: without one, once for every part of the batch.
    assert {len(calls) for calls in conditioned[1].values()} == {1, 2}
    assert {tuple(calls) for calls in conditioned[2].values()} == {
        (False, False),
        (False, True, False, True),
    }
    steps = [step for step, calls in conditioned[1].items() if calls == [False, True]]
    assert steps == [step for step, calls in conditioned[2].items() if True in calls]
    assert 10 < len(steps) < 30  # of 40 tosses: 20 +- 3.2
    assert load_run(tmp_path / "1").diffusion.self_conditioning
    assert load_run(tmp_path / "1").unet.conv_in.in_channels == 2


def test_it_learns(tmp_path):
    """One image, seen again and again: the model must come to know it."""
    rng = np.random.default_rng(1)
    image = np.where(rng.random((1, 8, 8, 1)) < 0.5, 0, 255).astype(np.uint8)
    learner = trainer(
        tmp_path,
        ArrayDataset(image),
        SMALL,
        class_cond=False,
        flip=False,
        steps=150,
        batch_size=32,
        lr=1e-2,
        ema=0.9,
        log_every=25,
        sample_steps=25,
    )
    learner.train()
    losses = [entry["loss"] for entry in learner.metrics.entries]
    assert losses[-1] < 0.5 * losses[0]
    from fastdiff.samplers import DDIM

    run = load_run(tmp_path)
    drawn = DDIM(run.diffusion, steps=25).sample(run.unet, (8, 1, 8, 8), seed=3, progress=False)
    target = torch.from_numpy(image / 127.5 - 1).permute(0, 3, 1, 2)
    # Pixels are +-1; noise of an untrained model agrees with half of them.
    agreement = (drawn.sign() == target.sign()).double().mean()
    assert agreement > 0.9


def test_the_learning_rate_warms_up_and_follows_the_cosine(tmp_path, dataset):
    one = trainer(tmp_path / "cosine", dataset, lr=0.5, warmup=10, steps=110)
    assert [one.learning_rate(step) for step in (0, 4, 9)] == pytest.approx([0.05, 0.25, 0.5])
    assert one.learning_rate(60) == pytest.approx(0.25)
    assert one.learning_rate(110) == pytest.approx(0.0)
    constant = trainer(tmp_path / "flat", dataset, lr=0.5, warmup=10, lr_schedule="constant")
    assert constant.learning_rate(10**6) == 0.5


def test_a_run_folder_holds_what_it_should(tmp_path, dataset):
    trainer(tmp_path, dataset, checkpoint_every=5, sample_every=6, keep=2).train()
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert names == [
        "checkpoints/step-00000010",
        "checkpoints/step-00000012",
        "model/model_index.json",
        "model/scheduler",
        "model/unet",
        "samples/step-00000006.png",
        "samples/step-00000012.png",
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Every log interval, and before each checkpoint and grid.
    assert [line["step"] for line in lines] == [4, 5, 6, 8, 10, 12]
    assert all(math.isfinite(line["loss"]) and line["images_per_second"] > 0 for line in lines)
    assert (tmp_path / "loss.png").exists()


def test_a_grid_is_drawn_no_more_images_at_a_time_than_are_trained_on(tmp_path, dataset):
    one = trainer(tmp_path, dataset, steps=1, batch_size=8, grad_accum=2, num_samples=10)
    sizes = []
    one.emas[0].model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    one.train()
    steps = one.config.sample_steps
    assert sizes == [4] * steps + [4] * steps + [2] * steps
    # The same images as all at once; another batch size may take other matrix kernels.
    from fastdiff.samplers import DDIM

    whole = DDIM(one.diffusion, steps=steps).sample(
        one.emas[0].model,
        (10, 1, 8, 8),
        seed=one.seed_grid,
        model_kwargs={"y": torch.arange(10) % 3},
        progress=False,
    )
    grid = np.asarray(image_grid(to_uint8(whole), labels=torch.arange(10) % 3), int)
    drawn = np.asarray(Image.open(tmp_path / "samples/step-00000001.png"), int)
    assert np.abs(drawn - grid).max() <= 1
    assert len(np.unique(grid)) > 10


@pytest.mark.parametrize("where", ["batch", "weight", "gradient"])
def test_what_is_not_finite_stops_the_run_and_names_the_step(tmp_path, dataset, where):
    run = trainer(tmp_path, dataset, checkpoint_every=5)
    parameter = run.unet.conv_out.bias

    def poison(gradient):
        return gradient * (math.nan if run.step == 6 else 1.0)

    def stop():
        if where == "weight" and run.step == 6:
            with torch.no_grad():
                parameter.fill_(math.inf)
        return False

    if where == "gradient":
        parameter.register_hook(poison)
    if where == "batch":
        run.unet.register_forward_pre_hook(lambda module, args: (poison(args[0]), *args[1:]))
    with pytest.raises(RunError, match=r"step 7: .* is (nan|inf) .*--lr.*checkpoint of step 5"):
        run.train(should_stop=stop)
    # Stopped before a checkpoint of the ruined weights could be written.
    assert load_newest(run.folder.checkpoints, pytest.fail).step == 5


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(tmp_path, dataset, monkeypatch):
    from fastdiff.training import checkpoint

    original = checkpoint.write_synced

    def fills_up(path, content):
        if "step-00000010" in str(path):
            raise OSError(28, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr(checkpoint, "write_synced", fills_up)
    run = trainer(tmp_path, dataset, checkpoint_every=5)
    with pytest.raises(RunError, match=r"step 10: .*No space left.*step 5 is intact.*--resume"):
        run.train()
    monkeypatch.undo()
    assert [path.name for path in run.folder.checkpoints.iterdir()] == ["step-00000005"]


def test_losses_decide_which_timesteps_are_drawn_however_a_batch_is_split(tmp_path, dataset):
    runs = []
    for accum in (1, 4):
        run = trainer(tmp_path / str(accum), dataset, **BY_LOSS, grad_accum=accum)
        run.train()
        runs.append(run)
    states = [run.timesteps.state_dict() for run in runs]
    assert torch.equal(states[0]["count"], states[1]["count"])
    assert int(states[0]["count"].sum()) == 12 * 16
    torch.testing.assert_close(states[0]["history"], states[1]["history"], rtol=1e-3, atol=1e-5)
    p = runs[0].timesteps.probabilities()
    assert float(p.max() / p.min()) > 1.5
