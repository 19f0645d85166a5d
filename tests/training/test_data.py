import gzip
import zipfile

import numpy as np
import pytest
from training.dataset_files import TRAINING_BATCHES, idx_bytes, write_cifar10, write_idx

from fastdiff.training import Batches, UserError, data, load_dataset


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_digits_are_scaled_to_bytes():
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits")
    assert dataset.shape == (8, 8, 1)
    assert dataset.images.dtype == np.uint8
    # 17 levels 15.9375 apart, each rounded to the nearest byte.
    difference = dataset.images[..., 0] / (255 / 16) - load_digits().images
    assert np.abs(difference).max() <= 0.5 / (255 / 16)
    assert (dataset.images.min(), dataset.images.max()) == (0, 255)
    assert np.array_equal(dataset.labels, load_digits().target)
    assert dataset.num_classes == 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, rng, suffix, place):
    images = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    write_idx(tmp_path / place, images, labels, suffix)
    dataset = load_dataset("fashion-mnist", str(tmp_path))
    assert np.array_equal(dataset.images[..., 0], images)
    assert np.array_equal(dataset.labels, labels)
    assert dataset.shape == (28, 28, 1)
    with pytest.raises(UserError, match="its test files are not in"):
        load_dataset("fashion-mnist", str(tmp_path), split="test")
    write_idx(tmp_path / place, images[:3], labels[:3], suffix, prefix="t10k")
    dataset = load_dataset("fashion-mnist", str(tmp_path), split="test")
    assert np.array_equal(dataset.images[..., 0], images[:3])


def test_fashion_mnist_is_found_in_the_usual_places(tmp_path, rng, monkeypatch):
    places = (str(tmp_path / "data"), str(tmp_path / "datasets"))
    monkeypatch.setattr(data, "USUAL_PLACES", places)
    assert not data.has_files("fashion-mnist")
    with pytest.raises(UserError, match=r"not in .*data or .*datasets; .*--download"):
        load_dataset("fashion-mnist")
    folder = tmp_path / "datasets/fashion-mnist"
    folder.mkdir(parents=True)
    images = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    write_idx(folder, images, np.arange(7, dtype=np.uint8), ".gz")
    assert data.has_files("fashion-mnist")
    assert np.array_equal(load_dataset("fashion-mnist").images[..., 0], images)


def test_damaged_and_missing_idx_files_are_named(tmp_path, rng):
    with pytest.raises(UserError, match=r"--data fashion-mnist: .*--data-dir"):
        load_dataset("fashion-mnist", str(tmp_path))
    images = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(tmp_path, images, labels)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="train-images-idx3-ubyte is damaged"):
        load_dataset("fashion-mnist", str(tmp_path))
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="is not an IDX file"):
        load_dataset("fashion-mnist", str(tmp_path))
    write_idx(tmp_path, images, labels[:-1])
    with pytest.raises(UserError, match="7 images but 6 labels"):
        load_dataset("fashion-mnist", str(tmp_path))
    write_idx(tmp_path, images, labels + 4)
    with pytest.raises(UserError, match=r"labels outside 0\.\.9 in .*train-labels-idx1-ubyte"):
        load_dataset("fashion-mnist", str(tmp_path))
    path.unlink()
    packed = path.with_name(path.name + ".gz")
    for damaged in (b"\x1f\x8bnot gzip", _zeroed(gzip.compress(idx_bytes(images)))):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot read .*ubyte\.gz"):
            load_dataset("fashion-mnist", str(tmp_path))


def _zeroed(content: bytes) -> bytes:
    """Zeros in the middle, as a download that was cut and resumed wrongly leaves them."""
    third = len(content) // 3
    return content[:third] + bytes(third) + content[2 * third :]


def test_a_damaged_npz_is_a_user_error_wherever_the_damage_is(tmp_path, rng):
    path = tmp_path / "images.npz"
    np.savez_compressed(path, images=rng.integers(0, 256, (9, 8, 8), dtype=np.uint8))
    content = path.read_bytes()
    refused = 0
    # Every byte of the headers of zip and .npy, and every third of the rest.
    for position in [*range(200), *range(200, len(content), 3)]:
        path.write_bytes(
            content[:position] + bytes((content[position] ^ 0xFF,)) + content[position + 1 :]
        )
        try:
            load_dataset(str(path))
        except UserError:
            refused += 1
    assert refused > 200  # the rest is dates and flags that nobody reads


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("layout", ["python", "binary"])
def test_cifar10_is_read_from_both_formats(tmp_path, rng, layout, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    planes = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(12) % 10
    write_cifar10(folder, TRAINING_BATCHES, planes[:10], labels[:10], layout)
    write_cifar10(folder, ["test_batch"], planes[10:], labels[10:], layout)
    for split, part in (("train", slice(10)), ("test", slice(10, 12))):
        dataset = load_dataset("cifar10", str(tmp_path), split=split)
        assert np.array_equal(dataset.images, planes[part].transpose(0, 2, 3, 1))
        assert np.array_equal(dataset.labels, labels[part])
        assert dataset.num_classes == 10


def test_npz_files(tmp_path, rng):
    path = tmp_path / "images.npz"
    images = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array([2, 0, 1]))
    dataset = load_dataset(str(path))
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == [2, 0, 1]
    assert dataset.num_classes == 3
    np.savez(path, images[..., 0])
    assert np.array_equal(load_dataset(str(path)).images, images[..., :1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((3, 4, 4, 3))}, r"expected images as uint8 .*float64"),
        ({"images": np.zeros((3, 3, 16, 16), np.uint8)}, r"expected images as uint8 \(N, H, W"),
        ({"pixels": np.zeros((3, 4, 4), np.uint8)}, "no array named 'images'"),
        ({"images": np.zeros((3, 4, 4), np.uint8), "labels": np.zeros(3)}, "labels as integers"),
        ({"images": np.zeros((3, 4, 4), np.uint8), "labels": np.arange(2)}, "3 images but 2"),
        ({"images": np.zeros((1, 4, 4), np.uint8), "labels": np.array([-1])}, r"from 0 .*-1\.\.-1"),
        (
            {"images": np.zeros((1, 4, 4), np.uint8), "labels": np.array([2**62])},
            r"labels from 0 to at most 65535, got 4611686018427387904\.\.",
        ),
    ],
)
def test_bad_npz_files_are_named(tmp_path, arrays, message):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        load_dataset(str(path))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((3, 4, 4, 3), 0.5), r"float64 \(3, 4, 4, 3\); .*\(images \* 255\)\.round"),
        (np.full((3, 4, 4, 3), -0.5, np.float32), r"\(\(images \+ 1\) \* 127\.5\)\.round"),
        (np.full((3, 4, 4, 3), 99.0), r"of 99\.\.99; scale them to 0\.\.255"),
        (np.full((3, 4, 4, 3), np.nan), "some of them NaN or infinite"),
        (np.full((3, 4, 4, 3), np.inf, np.float16), "some of them NaN or infinite"),
        (np.full((3, 4, 4, 3), 300, np.int64), r"int64 .* of 300\.\.300; scale them"),
        (np.zeros((3, 4, 4, 3), bool), r"bool .* of 0\.\.0; scale them"),
        (np.zeros((3, 3, 16, 16), np.uint8), r"N, C, H, W: images\.transpose\(0, 2, 3, 1\)"),
        (np.zeros((0, 4, 4), np.uint8), "holds no pixel"),
        (np.zeros((4, 0, 4), np.uint8), "holds no pixel"),
        (np.uint8(3), r"uint8 \(\)"),
        (np.zeros(9, np.uint8), r"uint8 \(9,\)"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), "got uint8"),
        (np.zeros((3, 4, 4), "M8[s]"), "got datetime64"),
        (np.zeros((3, 4, 4), "U3"), "got <U3"),
        (np.zeros((3, 4, 4), complex), "got complex128"),
        (np.zeros((3, 4, 4), [("\x1b[31m", "u1")]), r"got structured \(3, 4, 4\)"),
    ],
)
def test_arrays_that_are_no_images_say_what_would_make_them_some(tmp_path, images, message):
    np.savez(tmp_path / "images.npz", images=images)
    with pytest.raises(UserError, match=message) as error:
        load_dataset(str(tmp_path / "images.npz"))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "labels", [np.zeros(3), np.full(3, np.nan), np.zeros((3, 2), int), np.array(["a"] * 3)]
)
def test_labels_that_are_none(tmp_path, labels):
    np.savez(tmp_path / "images.npz", np.zeros((3, 4, 4), np.uint8), labels)
    with pytest.raises(UserError, match=r"labels as integers \(N,\), got .* \(3,"):
        load_dataset(str(tmp_path / "images.npz"))


def test_labels_with_gaps_make_classes_without_images(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((3, 4, 4), np.uint8), np.array([0, 7, 7]))
    said = []
    assert load_dataset(str(tmp_path / "images.npz"), warn=said.append).num_classes == 8
    assert "labels 0..7 make 8 classes, but only 2 of them have images" in said[0]


def test_numpy_s_advice_to_unpickle_is_not_passed_on(tmp_path):
    path = tmp_path / "images.npz"
    fields = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 2)}"
    for header in (fields + b" " * 60_000, b"{'descr': '|O', " + fields[15:], b"(1, 2)", b"\x1b"):
        with zipfile.ZipFile(path, "w") as archive:
            start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
            archive.writestr("images.npy", start + header + b"1234")
        with pytest.raises(UserError, match=r"images\.npz: ") as error:
            load_dataset(str(path))
        message = str(error.value)
        assert "allow_pickle" not in message
        assert "max_header_size" not in message
        assert message.isprintable()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.npy", "numpy.savez"),
        ("a.jpg", "into a folder"),
        ("a.zip", "unpack it"),
        ("a.x", ""),
    ],
)
def test_files_of_other_kinds_say_what_to_do(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"neither a folder of images nor an .npz file.*{remedy}"):
        load_dataset(str(tmp_path / name))


def test_an_empty_idx_file_has_no_image(tmp_path):
    write_idx(tmp_path, np.zeros((0, 28, 28), np.uint8), np.zeros(0, np.uint8))
    with pytest.raises(UserError, match="--data fashion-mnist: there is no image in it"):
        load_dataset("fashion-mnist", str(tmp_path))


def take(num_batches, *args, **kwargs):
    batches = iter(Batches(*args, **kwargs))
    taken = [next(batches) for _ in range(num_batches)]
    batches.close()
    return np.concatenate([labels.numpy() for _, labels in taken]), taken


def numbered(length):
    images = np.arange(length, dtype=np.uint8)[:, None, None, None]
    return data.ArrayDataset(images, np.arange(length), tuple(map(str, range(length))))


def test_every_epoch_is_another_permutation_and_images_keep_their_labels():
    order, taken = take(6, numbered(20), 10, seed=1)
    epochs = order.reshape(3, 20)
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for images, labels in taken:
        assert np.array_equal(images[:, 0, 0, 0], labels)


def test_the_order_depends_on_the_seed_alone():
    order, _ = take(15, numbered(20), 4, seed=1)
    assert np.array_equal(order, take(6, numbered(20), 10, seed=1)[0])  # not on the batch size
    assert np.array_equal(order[24:], take(9, numbered(20), 4, seed=1, start=24)[0])
    assert not np.array_equal(order, take(15, numbered(20), 4, seed=2)[0])
    # A batch may be longer than the dataset.
    assert np.array_equal(order, take(1, numbered(20), 60, seed=1)[0])
