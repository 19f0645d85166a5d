"""What a run folder holds for others, and what does not fit together."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from training.runs import SMALL, craft, resumed, trainer

from fastdiff import _backends
from fastdiff.nn import PRESETS
from fastdiff.training import RunFolder, UserError, load_run
from fastdiff.training.data import ArrayDataset
from fastdiff.training.run import build_diffusion, build_unet, choose_device


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
        for name in ("checksum", "format"):
            values.pop(name, None)
        path.write_text(json.dumps(values))
    assert load_run(part.folder.path).ema == SMALL.ema[0]
    again = resumed(part.folder.path, dataset, steps=4)
    assert again.train()
    for name, value in whole.emas[0].model.state_dict().items():
        assert torch.equal(again.emas[0].model.state_dict()[name], value)


def test_a_checkpoint_of_other_data_or_another_model_is_refused(tmp_path, dataset):
    trainer(tmp_path, dataset, steps=1).train()
    more = ArrayDataset(np.tile(dataset.images, (2, 1, 1, 1)), np.tile(dataset.labels, 2), "abc")
    with pytest.raises(UserError, match=r"does not hold .*: 30 images, now 60; .*--out"):
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
    craft(path, meta)
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


def test_a_preset_at_another_size_keeps_its_attention_levels():
    unet = build_unet(SMALL, (16, 16, 3), num_classes=3)
    assert unet.config.resolutions == (16, 8)
    assert unet.config.attention_resolutions == (8,)
    assert (unet.config.in_channels, unet.config.num_class_embeddings) == (3, 4)


def test_other_channels_than_the_presets_are_asked_for_or_an_error():
    config = dataclasses.replace(SMALL, channels="preset")
    assert build_unet(config, (8, 8, 1), num_classes=3).config.in_channels == 1
    message = r"tiny is made for 1 channels .* has 3; --channels grey .*presets for 3: ddpm_cifar10"
    with pytest.raises(UserError, match=message):
        build_unet(config, (8, 8, 3), num_classes=3)
    # There is nothing to convert to or choose from for two.
    with pytest.raises(UserError, match=r"has 2; --channels grey .* --channels data [a-z ]*$"):
        build_unet(config, (8, 8, 2), num_classes=3)
    for channels in ("data", "rgb"):  # what is converted has been by then
        config = dataclasses.replace(SMALL, channels=channels)
        assert build_unet(config, (8, 8, 3), num_classes=3).config.in_channels == 3


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
    monkeypatch.setattr(_backends, "_environment", "cuda")
    monkeypatch.setattr(_backends, "_environment_problem", None)
    with pytest.raises(UserError, match=r"--device cpu: backend 'cuda' .* on cuda tensors"):
        choose_device("cpu")
    monkeypatch.setattr(_backends, "_environment", "reference")
    assert choose_device("cpu") == torch.device("cpu")
