"""`python -m fastdiff.gallery`: every picture from a tiny run, and what a picture must hold."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY

from fastdiff import _cli, gallery
from fastdiff.evaluation import guiding_classifier
from fastdiff.gallery_pictures import PICTURES
from fastdiff.gallery_scene import Scene
from fastdiff.gallery_sheet import sheet
from fastdiff.nn import PRESETS
from fastdiff.training import RunFolder, TrainConfig, Trainer, load_dataset, load_run
from fastdiff.training.trained import training_images

CONFIG = TrainConfig(
    preset="tiny", steps=3, batch_size=8, timesteps=20, num_samples=4, sample_steps=2, device="cpu"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An unconditional and a class-conditional run, hardly trained."""
    patch = pytest.MonkeyPatch()
    patch.setitem(PRESETS, "tiny", TINY)
    folder = tmp_path_factory.mktemp("runs")
    for name, class_cond in (("plain", False), ("classes", True)):
        run = RunFolder(folder / name)
        config = dataclasses.replace(CONFIG, class_cond=class_cond, lr=1e-2, warmup=0)
        run.create(config)
        Trainer(config, load_dataset("digits"), run, torch.device("cpu")).train()
    patch.undo()
    return folder


@pytest.fixture
def run_gallery(monkeypatch, capfd, runs):
    """Call the command in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(runs)
    monkeypatch.setattr(guiding_classifier, "STEPS", 3)

    def call(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdiff.gallery", *argv, "--device", "cpu"])
        with pytest.raises(SystemExit) as stopped:
            _cli.run(gallery.PROGRAM, gallery.main, gallery.NEEDS)
        return stopped.value.code, *capfd.readouterr()

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["plain", "classes"])
def test_every_picture_of_a_run(run_gallery, runs, name):
    code, out, error = run_gallery(name, "--num", "3", "--steps", "4")
    assert code == 0
    expected = set(PICTURES) - ({"classifier_free"} if name == "plain" else set())
    found = {path.stem: path for path in (runs / name / "gallery").iterdir()}
    assert set(found) == expected
    assert ("left out: classifier_free: needs a run trained with --class-cond" in error) == (
        name == "plain"
    )
    for stem, path in found.items():
        assert str(path.relative_to(runs)) in out
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 150, stem
        assert pixels.max() == 255, stem
        assert pixels.std() > 20, stem
    assert (runs / name / "classifier.safetensors").exists()
    # Another time the classifier is there, and the same pixels come out.
    before = found["classifier"].read_bytes()
    code, _, error = run_gallery(name, "--num", "3", "--steps", "4", "--only", "classifier")
    assert code == 0
    assert "training" not in error
    assert found["classifier"].read_bytes() == before


def test_bad_input_is_one_line(run_gallery):
    for argv, fragments in (
        (["plain", "--only", "forwards"], ["--only forwards", "give one of forward, denoising"]),
        (["plain", "--only", "classifier_free"], ["--only classifier_free", "--class-cond"]),
        (["plain", "--num", "0"], ["--num 0"]),
        (["nowhere"], ["RUN: nowhere holds no run"]),
    ):
        code, _, error = run_gallery(*argv)
        assert code == 2
        assert error.count("\n") == 1
        assert all(fragment in error for fragment in fragments), error


def test_a_sheet_puts_tiles_in_their_places_and_labels_beside_them():
    tiles = [
        [torch.full((1, 8, 8), 40 * r + 20 * c, dtype=torch.uint8) for c in range(3)]
        for r in (0, 1)
    ]
    tiles[1][2] = None
    picture = sheet(tiles, "Title", "what it is", ["first", "second"], ["a", "b", "c"], groups=2)
    pixels = np.asarray(picture)
    assert picture.mode == "L"
    # Every tile is a square of 48 pixels of its colour.
    for value in (0, 20, 40, 60):
        rows, columns = np.nonzero(pixels == value)
        inside = (rows > pixels.shape[0] - 120) & (columns > 40)
        assert np.count_nonzero(inside) >= 48 * 48
    lefts = [np.nonzero((pixels == v).sum(0) >= 48)[0].min() for v in (0, 20)]
    assert lefts[1] - lefts[0] == 52
    assert (pixels[-62:-14, -62:-14] == 255).all()  # the empty place
    with pytest.raises(ValueError, match="column_labels has 1 entries, expected 3"):
        sheet(tiles, "", column_labels=["a"])
    with pytest.raises(ValueError, match="rows hold no tile"):
        sheet([[None]], "")


def test_pictures_show_what_they_say(runs):
    """Real images in turn of class; x_t ends in noise; the last consistency row is DDIM's."""
    run = load_run(runs / "classes")
    scene = Scene(
        run, lambda: training_images(run), runs / "classes", torch.device("cpu"), 3, 4, 0, print
    )
    images, labels, chosen = scene.real(12)
    assert labels.tolist() == [*range(10), 0, 1]
    dataset = load_dataset("digits")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), dataset.images[chosen])
    assert np.array_equal(dataset.labels[chosen], labels)
    assert scene.some_steps() == [5, 10, 20]
