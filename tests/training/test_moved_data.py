"""A run goes on wherever its data are now, and with no others: content decides, not the path."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fastdiff import train
from fastdiff.training import Trainer, UserError, snapshot
from fastdiff.training.data import load_dataset

FLAGS = ["--preset", "tiny", "--channels", "data", "--batch-size", "4", "--timesteps", "20"]
FLAGS += ["--sample-steps", "2", "--num-samples", "4", "--log-every", "1", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of twelve images in two classes; the process works beside it."""
    rng = np.random.default_rng(0)
    for k in range(12):
        path = tmp_path / "photos" / "ab"[k % 2] / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    (tmp_path / "other/deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time of such short runs."""
    monkeypatch.setattr(Trainer, "save_samples", lambda self: None)
    monkeypatch.setattr(snapshot, "save_model", lambda trainer: None)


def start(data, *more, steps=2):
    argv = [*FLAGS, "--data", str(data), "--out", "run", "--steps", str(steps), *more]
    assert train.main(argv) == 0


def resume(*more, out="run", steps=3):
    return train.main(["--resume", "--out", str(out), "--steps", str(steps), *map(str, more)])


def test_the_same_folder_by_any_name(photos, tmp_path, monkeypatch):
    start("photos")
    (tmp_path / "way").symlink_to(photos, target_is_directory=True)
    for steps, data in enumerate(("photos/", "./photos", photos, "other/../photos/.", "way"), 3):
        assert resume("--data", data, steps=steps) == 0
    monkeypatch.chdir(tmp_path / "other/deep")
    assert resume("--data", "../../photos", out="../../run", steps=9) == 0
    # What was given last is what a continuation without --data takes.
    assert json.loads((tmp_path / "run/config.json").read_text())["data"] == "../../photos"
    assert resume(out="../../run", steps=10) == 0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"run are not in \.\./\.\./photos any more; say with --data"
    ):
        resume(steps=11)


def test_a_folder_that_moved_goes_on_bit_for_bit(photos, tmp_path):
    constant = ("--lr-schedule", "constant")  # or the rate depends on the last step
    start("photos", *constant, steps=2)
    shutil.copytree(photos, tmp_path / "elsewhere/images")  # another order on the disk, other times
    shutil.rmtree(photos)
    assert resume("--data", "elsewhere/images", steps=4) == 0
    moved = (tmp_path / "run/checkpoints/step-00000004/model.safetensors").read_bytes()
    shutil.rmtree("run")
    start("elsewhere/images", *constant, steps=4)
    assert moved == (tmp_path / "run/checkpoints/step-00000004/model.safetensors").read_bytes()


def _one_more(photos):
    shutil.copy(photos / "a/00.png", photos / "a/50.png")


def _renamed(photos):
    (photos / "a/00.png").rename(photos / "a/01.png")


def _another_class(photos):
    (photos / "b").rename(photos / "c")


def _moved_between_classes(photos):
    (photos / "a/00.png").rename(photos / "b/00.png")


def _another_picture(photos):
    Image.new("L", (8, 8)).save(photos / "a/00.png")


def _another_shape(photos):
    for path in photos.rglob("*.png"):
        Image.open(path).resize((16, 16)).save(path)


def _no_class(photos):
    Image.new("L", (8, 8)).save(photos / "stray.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_more, "12 images, now 13; files of other names"),
        (_renamed, ": files of other names;"),
        (_another_class, "without the class b and with the new class c; files of other names"),
        (_moved_between_classes, "files of other names; other labels"),
        (_another_picture, r"files of the same names and other sizes \(\d+ bytes, now \d+\);"),
        (_another_shape, "images of 8x8x1, now 16x16x1; files of the same names and other sizes"),
        (_no_class, "12 images, now 13; without the classes a, b"),
    ],
)
def test_other_content_is_refused_with_what_differs(photos, change, message, tmp_path):
    start("photos")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    change(photos)
    with pytest.raises(UserError, match=rf"--resume: --data photos does not hold .*{message}"):
        resume()
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_arrays_are_known_by_their_pixels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (9, 8, 8), dtype=np.uint8), np.arange(9) % 3
    np.savez("a.npz", images=images, labels=labels)
    start("a.npz")
    (tmp_path / "sub").mkdir()
    np.savez_compressed("sub/B.NPZ.npz", arr_0=images, arr_1=labels.astype(np.uint8))
    assert resume("--data", "sub/B.NPZ.npz") == 0
    for changes, message in (
        ({"images": images ^ 1}, "other pixels;"),
        ({"labels": labels[::-1].copy()}, "other labels of the images;"),
        ({"images": images[:8], "labels": labels[:8]}, "9 images, now 8; other pixels"),
    ):
        np.savez("a.npz", **{"images": images, "labels": labels, **changes})
        with pytest.raises(UserError, match=f"does not hold .*: {message}"):
            resume("--data", "a.npz")
    with pytest.raises(UserError, match=r"--data digits does not hold .*9 images, now 1797; "):
        resume("--data", "digits")


def test_a_digest_does_not_depend_on_how_images_are_held(photos, monkeypatch):
    held = load_dataset(str(photos))
    monkeypatch.setattr("fastdiff.training.data.IN_MEMORY_BYTES", 0)
    assert load_dataset(str(photos)).identity == held.identity
    assert load_dataset(str(photos), image_size=4, channels=3).identity == held.identity
    assert json.loads(json.dumps(held.identity)) == held.identity


def test_runs_of_older_versions_go_on(photos, tmp_path):
    """Their checkpoints have the path among the settings, and no digest."""
    start("photos")
    path = tmp_path / "run/checkpoints/step-00000002/checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["data"]
    manifest["settings"]["data"] = "photos"
    del manifest["checksum"], manifest["format"]
    path.write_text(json.dumps(manifest))
    os.rename("photos", "moved")
    _one_more(tmp_path / "moved")
    with pytest.raises(UserError, match=r"does not hold .*: 12 images, now 13;"):
        resume("--data", "moved")
    (tmp_path / "moved/a/50.png").unlink()
    assert resume("--data", "moved") == 0
    assert "data" in json.loads(
        (tmp_path / "run/checkpoints/step-00000003/checkpoint.json").read_text()
    )


def test_a_single_image_may_be_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    Image.linear_gradient("L").resize((8, 8)).save("one/a.png")
    start("one")
    assert resume("--data", "one/") == 0
