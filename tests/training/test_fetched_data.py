"""Datasets through other packages: torchvision's download, Hugging Face."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training.dataset_files import TRAINING_BATCHES, write_cifar10, write_idx

from fastdiff.training import TrainConfig, UserError, hub, load_dataset
from fastdiff.training.download import download


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision whose datasets write files in its layout instead of fetching them."""
    fetched = []
    rng = np.random.default_rng(0)

    def cifar10(root):
        folder = root / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        planes = rng.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
        write_cifar10(folder, TRAINING_BATCHES, planes, np.arange(10), "python")

    def fashion_mnist(root):
        folder = root / "FashionMNIST/raw"
        folder.mkdir(parents=True)
        images = rng.integers(0, 256, (10, 28, 28), dtype=np.uint8)
        write_idx(folder, images, np.arange(10, dtype=np.uint8))

    def recorded(write):
        def call(root, download):
            assert download
            fetched.append(write.__name__)
            write(Path(root))

        return call

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(
        CIFAR10=recorded(cifar10), FashionMNIST=recorded(fashion_mnist)
    )
    module.fetched = fetched
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return module


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_files_are_fetched_once(torchvision, tmp_path, name):
    for _ in range(2):
        download(name, str(tmp_path / "data"))
        assert len(load_dataset(name, str(tmp_path / "data"))) == 10
    assert torchvision.fetched == [name.replace("-", "_")]


def test_a_download_that_cannot_work_says_why(torchvision, tmp_path, monkeypatch):
    def offline(root, download):
        raise OSError("urlopen error:\nName or service not known")

    torchvision.datasets.CIFAR10 = offline
    with pytest.raises(UserError, match=r"cannot fetch cifar10 into .*: urlopen error: Name or"):
        download("cifar10", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"needs torchvision; .*--data-dir"):
        download("cifar10", str(tmp_path))
    with pytest.raises(UserError, match="cifar10 and fashion-mnist only, not --data digits"):
        download("digits")


def test_hugging_face_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:cifar10 needs the package datasets; .*pip install"):
        load_dataset("hf:cifar10")
    old = types.ModuleType("datasets")
    old.__version__ = "3.6.0"
    monkeypatch.setitem(sys.modules, "datasets", old)
    with pytest.raises(UserError, match=r"there is 3\.6\.0; older ones may run code"):
        load_dataset("hf:cifar10")


def test_the_run_folder_of_a_hugging_face_dataset():
    assert str(TrainConfig.for_data("hf:user/birds:train[:10%]").run_folder) == (
        "runs/user-birds-train-10"
    )
    assert TrainConfig.for_data("hf:..").run_folder.name == "hf"


@pytest.fixture
def saved(tmp_path, rng):
    """A dataset on the disk as `datasets` saves it, and its images."""
    datasets = pytest.importorskip("datasets")
    pixels = rng.integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )

    def table(rows):
        values = {
            "id": list(rows),
            "photo": [Image.fromarray(pixels[i]) for i in rows],
            "kind": [i % 2 for i in rows],
        }
        return datasets.Dataset.from_dict(values, features=features)

    whole = datasets.DatasetDict(train=table(range(5)), test=table(range(5, 7)))
    whole.save_to_disk(str(tmp_path / "both"))
    whole["train"].save_to_disk(str(tmp_path / "one"))
    return datasets, tmp_path, pixels


def test_a_saved_dataset(saved):
    _, folder, pixels = saved
    for name in (folder / "both", folder / "one", f"hf:{folder / 'one'}"):
        dataset = load_dataset(str(name))
        assert dataset.shape == (6, 6, 3)
        assert np.array_equal(dataset.images, pixels[:5])
        assert dataset.labels.tolist() == [0, 1, 0, 1, 0]
        assert dataset.classes == ("cat", "dog")
    for name in (str(folder / "both"), f"hf:{folder / 'both'}:test"):
        split = "train" if name.endswith("test") else "test"
        assert np.array_equal(load_dataset(name, split=split).images, pixels[5:])
    assert load_dataset(str(folder / "one"), image_size=4).shape == (4, 4, 3)
    with pytest.raises(UserError, match="has no split test"):
        load_dataset(str(folder / "one"), split="test")
    with pytest.raises(UserError, match="no split validation; has train, test"):
        load_dataset(f"hf:{folder / 'both'}:validation")


def test_a_dataset_that_is_not_one_of_images(saved, monkeypatch):
    datasets, folder, _ = saved
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(folder / "text"))
    with pytest.raises(UserError, match=r"no column of images among text"):
        load_dataset(str(folder / "text"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="hf:nobody/nothing: cannot load it: division by zero"):
        load_dataset("hf:nobody/nothing")
    with pytest.raises(UserError, match="give hf:NAME"):
        load_dataset(hub.PREFIX)


def test_bytes_that_are_no_image_are_skipped(saved):
    datasets, folder, pixels = saved
    table = datasets.load_from_disk(str(folder / "one")).cast_column(
        "photo", datasets.Image(decode=False)
    )
    rows = table.to_list()
    rows[2]["photo"] = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n", "path": None}
    datasets.Dataset.from_list(rows, features=table.features).save_to_disk(str(folder / "bad"))
    said = []
    dataset = load_dataset(str(folder / "bad"), warn=said.append)
    assert np.array_equal(dataset.images, pixels[[0, 1, 3, 4]])
    assert dataset.labels.tolist() == [0, 1, 1, 0]
    assert "skipped 1 of 5 images" in said[0]
    assert "image 2 (not an image" in said[0]


def test_rows_without_an_image_are_skipped_and_an_empty_table_is_named(saved):
    datasets, folder, pixels = saved
    table = datasets.load_from_disk(str(folder / "one")).cast_column(
        "photo", datasets.Image(decode=False)
    )
    rows = table.to_list()
    rows[1]["photo"] = None
    rows[3]["photo"] = {"bytes": None, "path": "/nowhere.png"}
    datasets.Dataset.from_list(rows, features=table.features).save_to_disk(str(folder / "gaps"))
    said = []
    dataset = load_dataset(str(folder / "gaps"), warn=said.append)
    assert np.array_equal(dataset.images, pixels[[0, 2, 4]])
    assert "skipped 2 of 5 images" in said[0]
    table.select([]).save_to_disk(str(folder / "empty"))
    with pytest.raises(UserError, match="empty: there is no image in it"):
        load_dataset(str(folder / "empty"))
