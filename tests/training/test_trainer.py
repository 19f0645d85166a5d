import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import _backends
from fastdiff.images import image_grid, to_uint8
from fastdiff.nn import PRESETS
from fastdiff.training import RunError, RunFolder, TrainConfig, Trainer, UserError, load_run
from fastdiff.training.checkpoint import load_newest
from fastdiff.training.data import ArrayDataset
from fastdiff.training.run import build_diffusion, build_unet, choose_device

SMALL = TrainConfig(
    preset="tiny",
    steps=12,
    batch_size=8,
    timesteps=50,
    warmup=3,
    log_every=4,
    sample_every=1000,
    checkpoint_every=1000,
    num_samples=4,
    sample_steps=2,
    device="cpu",
    class_cond=True,
    label_dropout=0.3,
    flip=True,
)


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    return ArrayDataset(images, np.arange(30) % 3, ("a", "b", "c"))


def trainer(path, dataset, config=SMALL, **changes):
    config = dataclasses.replace(config, **changes)
    config.validate()
    folder = RunFolder(path)
    folder.create(config)
    return Trainer(config, dataset, folder, torch.device("cpu"))


def resumed(path, dataset, config=SMALL, **changes):
    again = trainer(path, dataset, config, resume=True, **changes)
    again.restore(load_newest(again.folder.checkpoints, pytest.fail))
    return again


def without_dropout(trainer):
    """Its masks follow the order of memory, and the parts of a batch."""
    for module in trainer.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


def everything(trainer):
    """All state of a run, as a flat dict of tensors."""
    tensors = {f"model.{name}": value for name, value in trainer.unet.state_dict().items()}
    for ema in trainer.emas:
        average = ema.model.state_dict()
        tensors |= {f"ema.{ema.decay}.{name}": value for name, value in average.items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors |= {f"timesteps.{k}": value for k, value in trainer.timesteps.state_dict().items()}
    tensors["random"] = torch.get_rng_state()
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


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_in_another_memory_format(tmp_path, dataset, first):
    """Its optimizer's state follows: fused kernels take the order of elements for granted."""
    whole = without_dropout(trainer(tmp_path / "whole", dataset))
    assert whole.train()
    part = without_dropout(trainer(tmp_path / "part", dataset, channels_last=first))
    part.train(should_stop=lambda: part.step == 6)
    again = without_dropout(resumed(tmp_path / "part", dataset, channels_last=not first))
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
        one = without_dropout(trainer(tmp_path / str(accum), dataset, grad_accum=accum, steps=1))
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
    grid = np.asarray(image_grid(to_uint8(whole)), int)
    drawn = np.asarray(Image.open(tmp_path / "samples/step-00000001.png"), int)
    assert np.abs(drawn - grid).max() <= 1
    assert len(np.unique(grid)) > 10


def test_a_loaded_run_has_the_averaged_weights(tmp_path, dataset):
    done = trainer(tmp_path, dataset)
    done.train()
    run = load_run(tmp_path)
    assert run.step == 12
    assert run.image_shape == (1, 8, 8)
    assert not run.unet.training
    for name, value in done.emas[0].model.state_dict().items():
        assert torch.equal(run.unet.state_dict()[name], value)
    assert any(
        not torch.equal(value, run.unet.state_dict()[name])
        for name, value in done.unet.state_dict().items()
    )


def test_every_average_is_kept_and_the_one_asked_for_is_loaded(tmp_path, dataset):
    done = trainer(tmp_path, dataset, ema=(0.5, 0.9, 0.0))
    done.train()
    for given, ema in ((None, done.emas[0]), *zip((0.5, 0.9, 0.0), done.emas, strict=True)):
        run = load_run(tmp_path, ema=given)
        assert run.ema == ema.decay
        for name, value in ema.model.state_dict().items():
            assert torch.equal(run.unet.state_dict()[name], value), name
    weights = [ema.model.conv_in.weight for ema in done.emas]
    assert torch.equal(weights[2], done.unet.conv_in.weight)  # decay 0 copies
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(
        UserError, match=r"--ema 0\.99: .* has averages of decay 0\.5 or 0\.9 or 0\.0"
    ):
        load_run(tmp_path, ema=0.99)


def test_a_run_of_an_older_version_goes_on(tmp_path, dataset):
    """It had one average, by its number, and no name for what came later."""
    whole = trainer(tmp_path / "whole", dataset, steps=4)
    assert whole.train()
    part = trainer(tmp_path / "part", dataset, steps=4)
    part.train(should_stop=lambda: part.step == 2)
    manifest = tmp_path / "part/checkpoints/step-00000002/checkpoint.json"
    for path in (manifest, part.folder.config):
        values = json.loads(path.read_text())
        settings = values.get("settings", values)
        settings["ema"] = settings["ema"][0]
        path.write_text(json.dumps(values))
    assert load_run(part.folder.path).ema == SMALL.ema[0]
    again = resumed(part.folder.path, dataset, steps=4)
    assert again.train()
    for name, value in whole.emas[0].model.state_dict().items():
        assert torch.equal(again.emas[0].model.state_dict()[name], value)


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


def test_a_checkpoint_of_other_data_or_another_model_is_refused(tmp_path, dataset):
    trainer(tmp_path, dataset, steps=1).train()
    more = ArrayDataset(np.tile(dataset.images, (2, 1, 1, 1)), np.tile(dataset.labels, 2), "abc")
    with pytest.raises(UserError, match=r"another run: num_images is 30, not 60; .*--out"):
        resumed(tmp_path, more)
    with pytest.raises(UserError, match=r"settings\.class_cond is True, not False") as raised:
        resumed(tmp_path, dataset, class_cond=False)
    assert "unet.num_classes is 3, not None" in str(raised.value)
    assert "channel_mult" not in str(raised.value)  # the same in both


@pytest.mark.parametrize(
    "changes",
    [{"schedule": "linear", "prediction": "v"}, {"timesteps": 40}, {"seed": 1}, {"lr": 1e-5}],
)
def test_a_checkpoint_of_other_settings_is_refused_unless_they_are_free(tmp_path, dataset, changes):
    """Even where config.json agrees: the checkpoints may have come from another folder."""
    trainer(tmp_path, dataset, steps=1).train()
    if changes == {"lr": 1e-5}:
        assert resumed(tmp_path, dataset, **changes).step == 1
        return
    with pytest.raises(UserError, match="is of another run") as raised:
        resumed(tmp_path, dataset, **changes)
    differing = str(raised.value).removesuffix("; train anew with another --out").split("; ")
    assert len(differing) == len(changes)
    for line, (name, value) in zip(differing, changes.items(), strict=True):
        assert line.endswith(f"settings.{name} is {getattr(SMALL, name)}, not {value}")


def test_a_loaded_run_follows_its_checkpoint_not_config_json(tmp_path, dataset):
    trainer(tmp_path, dataset, steps=1).train()
    other = dataclasses.replace(SMALL, schedule="linear", prediction="v", threads=3)
    (tmp_path / "config.json").write_text(other.to_json())
    run = load_run(tmp_path)
    assert (run.diffusion.prediction, run.config.prediction) == ("eps", "eps")
    assert torch.equal(run.diffusion.schedule.betas, build_diffusion(SMALL).schedule.betas)
    assert run.config.threads == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.pop("unet"), "step-00000001 .* does not say its unet"),
        (lambda meta: meta.pop("settings"), "does not say its settings"),
        (lambda meta: meta["unet"].update(channels=16), "do not fit the U-Net"),
        (lambda meta: meta["unet"].update(channels=9), "RUN: checkpoint .*channels must be even"),
        (lambda meta: meta["unet"].update(chanels=8), "RUN: checkpoint .*chanels"),
        (lambda meta: meta["settings"].update(loss=3), "loss: expected str, got 3"),
        (lambda meta: meta.update(unet=[]), "RUN: checkpoint"),
        (lambda meta: meta.update(settings=[]), "expected settings by name, got a list"),
    ],
)
def test_a_checkpoint_that_does_not_describe_a_run_is_named(tmp_path, dataset, change, message):
    trainer(tmp_path, dataset, steps=1).train()
    path = tmp_path / "checkpoints/step-00000001/checkpoint.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=message):
        load_run(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "{", "\xff"])
def test_a_config_json_that_holds_no_settings_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"RUN: .*config\.json"):
        load_run(tmp_path)


def test_a_learned_variance_needs_a_loss_that_trains_it():
    with pytest.raises(UserError, match=r"--loss mse .*--variance learned_range; choose --loss hy"):
        build_diffusion(dataclasses.replace(SMALL, variance="learned_range"))
    with pytest.raises(UserError, match=r"--loss, --variance or --weighting: loss='hybrid' adds"):
        build_diffusion(dataclasses.replace(SMALL, loss="hybrid"))
    # A preset made for learned variances follows --variance.
    assert build_unet(SMALL, (8, 8, 1), num_classes=3).config.out_channels == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_twice_the_channels_for_a_learned_variance(preset):
    size = PRESETS[preset].sample_size
    for variance, factor in (("learned", 2), ("learned_range", 2), ("fixed_small", 1)):
        config = dataclasses.replace(SMALL, preset=preset, variance=variance)
        with torch.device("meta"):
            unet = build_unet(config, (size, size, 3), num_classes=3)
        assert unet.config.out_channels == 3 * factor
        assert unet.conv_out.out_channels == 3 * factor


def test_losses_decide_which_timesteps_are_drawn_however_a_batch_is_split(tmp_path, dataset):
    runs = []
    for accum in (1, 4):
        run = without_dropout(trainer(tmp_path / str(accum), dataset, **BY_LOSS, grad_accum=accum))
        run.train()
        runs.append(run)
    states = [run.timesteps.state_dict() for run in runs]
    assert torch.equal(states[0]["count"], states[1]["count"])
    assert int(states[0]["count"].sum()) == 12 * 16
    torch.testing.assert_close(states[0]["history"], states[1]["history"], rtol=1e-3, atol=1e-5)
    p = runs[0].timesteps.probabilities()
    assert float(p.max() / p.min()) > 1.5


def test_a_preset_at_another_size_keeps_its_attention_levels():
    unet = build_unet(SMALL, (16, 16, 3), num_classes=3)
    assert unet.config.resolutions == (16, 8)
    assert unet.config.attention_resolutions == (8,)
    assert (unet.config.in_channels, unet.config.num_class_embeddings) == (3, 4)


def test_data_that_does_not_fit_the_model_is_named():
    with pytest.raises(UserError, match="multiples of 2, got 9x9"):
        build_unet(SMALL, (9, 9, 1), num_classes=3)
    with pytest.raises(UserError, match="--class-cond needs images with classes"):
        build_unet(SMALL, (8, 8, 1), num_classes=0)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file").check_new()
    with pytest.raises(UserError, match="cannot write in"):
        RunFolder(tmp_path / "file" / "below").check_new()
    with pytest.raises(UserError, match="is not empty; continue that run with --resume"):
        RunFolder(tmp_path).check_new()
    RunFolder(tmp_path / "new" / "run").check_new()


def test_only_one_process_starts_a_run_in_a_folder(tmp_path):
    """Two that both found the folder empty: the second must not write into the first's run."""
    folder = RunFolder(tmp_path / "run")
    folder.check_new()
    folder.check_new()
    folder.create(SMALL)
    other = dataclasses.replace(SMALL, seed=1)
    with pytest.raises(UserError, match=r"--out .*another process has started a run there"):
        folder.create(other)
    assert json.loads(folder.config.read_text())["seed"] == 0
    folder.create(dataclasses.replace(SMALL, resume=True, steps=20))
    assert json.loads(folder.config.read_text())["steps"] == 20


@pytest.mark.parametrize("name", ["meta", "vulkan:0", "", "abacus"])
def test_devices_that_cannot_train_are_refused(name):
    with pytest.raises(UserError, match=rf"--device {name}: give auto or one of cpu, cuda, "):
        choose_device(name)
    assert choose_device("cpu:0") == torch.device("cpu:0")


def test_a_forced_backend_that_cannot_run_is_an_error_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(_backends, "_forced", "cuda")
    monkeypatch.setattr(_backends, "_forced_problem", None)
    with pytest.raises(UserError, match=r"--device cpu: backend 'cuda' .* on cuda tensors"):
        choose_device("cpu")
    monkeypatch.setattr(_backends, "_forced", "reference")
    assert choose_device("cpu") == torch.device("cpu")
