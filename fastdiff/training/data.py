"""Images to train on, uint8 from the file to the device, and the order they come in.

A dataset is anything with ``__len__``, ``shape`` (H, W, C), ``labels``, ``num_classes`` and
``read(indices) -> uint8 (B, H, W, C)``. `load_dataset` makes one from the value of ``--data``;
`Batches` walks through it in seeded random order from any position.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastdiff.training import folders, hub, identity
from fastdiff.training.archives import CIFAR10_CLASSES, read_cifar10, read_idx_pair, read_npz
from fastdiff.training.config import BUILT_IN_DATA
from fastdiff.training.encoded import EncodedDataset
from fastdiff.training.errors import UserError, printable
from fastdiff.training.image_files import image_suffixes

FASHION_MNIST_CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# Where torchvision (run from the project's folder) and Debian's dataset-fashion-mnist put files.
USUAL_PLACES = ("data", "/usr/share/datasets")

_FILES = {
    "fashion-mnist": (("FashionMNIST/raw",), read_idx_pair, FASHION_MNIST_CLASSES),
    "cifar10": (("cifar-10-batches-py", "cifar-10-batches-bin"), read_cifar10, CIFAR10_CLASSES),
}

# Of red, green and blue, in 16-bit fixed point: Pillow's, whose decoded images are the same.
_LUMA = np.array((19595, 38470, 7471), np.uint32)

Split = Literal["train", "test"]

# What decodes to less than this is decoded once and kept; a larger set, batch by batch.
IN_MEMORY_BYTES = 2 << 30


class ArrayDataset:
    """Images held in memory.

    Parameters
    ----------
    images : numpy.ndarray
        uint8 (N, H, W, C).
    labels : numpy.ndarray, optional
        int64 (N,) in 0..len(classes)-1.
    classes : tuple of str
        Names of the classes.
    identity : dict, optional
        What makes these images the same wherever they are; default: the pixels' and labels' digest.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.classes = classes
        self.shape: tuple[int, int, int] = images.shape[1:]
        self.num_classes = len(classes)
        self._identity = identity

    def __len__(self) -> int:
        return len(self.images)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes these images the same wherever they are."""
        if self._identity is None:
            self._identity = identity.of_arrays(self.images, self.labels)
        return self._identity

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return images as uint8 (B, H, W, C)."""
        return self.images[indices]


Dataset = ArrayDataset | EncodedDataset


def load_dataset(
    data: str,
    data_dir: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    *,
    split: Split = "train",
    warn: Callable[[str], None] = warnings.warn,
) -> Dataset:
    """Load what ``--data`` names.

    Parameters
    ----------
    data : str
        "digits", "fashion-mnist", "cifar10", "hf:NAME" or "hf:NAME:SPLIT" (a dataset of the
        Hugging Face Hub), a folder of images or one that `datasets` saved, or an .npz file.
    data_dir : str, optional
        Where the files of fashion-mnist and cifar10 are.
    image_size : int, optional
        For a folder and hf: resize and centre-crop every image to this size.
    channels : {1, 3}, optional
        Convert every image to grey (ITU-R 601 luma, as Pillow does) or RGB.
    split : {"train", "test"}
        The test images of fashion-mnist, cifar10 and hf, which training never sees.
    warn : callable
        Is told which images and classes cannot be used, and what was hardly meant.

    Raises
    ------
    UserError
        For an unknown name and for files that are missing, unreadable or of mixed sizes.
    """
    dataset = _load(data, data_dir, image_size, channels, split, warn)
    if not len(dataset):
        raise UserError(f"--data {printable(data)}: there is no image in it")
    if channels is not None and dataset.shape[2] != channels:
        images = _converted(data, dataset.images, channels)
        dataset = ArrayDataset(images, dataset.labels, dataset.classes, dataset.identity)
    return dataset


def _load(data, data_dir, image_size, channels, split, warn) -> Dataset:
    path, shown = Path(data), printable(data)
    # Not Path.exists, which raises for what can be no name at all: too long, or with a zero byte.
    from_hub = data.startswith(hub.PREFIX) or hub.is_saved(path)
    if data not in BUILT_IN_DATA and not from_hub and not os.path.exists(path):
        place = "" if path.is_absolute() else f" (looked for in {printable(os.getcwd())})"
        raise UserError(
            f"--data {shown}: no such dataset, folder or file{place}; give one of "
            f"{', '.join(BUILT_IN_DATA)}, hf:NAME, a folder of images, or an .npz file"
        )
    is_folder = data not in BUILT_IN_DATA and os.path.isdir(path)
    if image_size is not None and not from_hub and not is_folder:
        raise UserError(f"--image-size applies to a folder of images, not to --data {shown}")
    if from_hub:
        return _decoded(shown, *hub.load(data, split), image_size, channels, warn)
    if data in _FILES:
        return ArrayDataset(*_built_in(data, data_dir, split))
    if split != "train":
        raise UserError(f"--data {shown} has no test images of its own")
    if data == "digits":
        return _digits()
    if is_folder:
        return _folder(path, image_size, channels, warn)
    if path.suffix.lower() == ".npz":
        return ArrayDataset(*read_npz(path, warn))
    raise UserError(f"--data {shown}: neither a folder of images nor an .npz file{_remedy(path)}")


def _remedy(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return "; numpy.savez makes one of an array"
    if suffix in image_suffixes():
        return "; put the image into a folder and give that"
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
        return "; unpack it and give the folder"
    return ""


def has_files(data: str, data_dir: str | None = None) -> bool:
    """Whether the files of fashion-mnist or cifar10 are in ``data_dir`` or a usual place."""
    _, read, _ = _FILES[data]
    return any(read(folder, "train") is not None for folder in _places(data, data_dir))


class Batches:
    """Batches in seeded random order: every epoch is a permutation of the dataset.

    Where a batch lies in that order is one number, how many samples came before it, so the
    position needs no state of its own: start anew with ``start`` to continue a run exactly.

    Parameters
    ----------
    dataset : Dataset
        Where images come from.
    batch_size : int
        Images per batch; batches run across the end of an epoch.
    seed : int
        Non-negative; with the epoch's number it determines the permutation.
    start : int
        How many samples were already drawn.
    part : slice
        Which images of each batch are read: the share of one of several processes.
    device : torch.device
        Where batches go from here. For a GPU the reading thread puts them into pinned memory, which
        the GPU copies from while the caller goes on.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        start: int = 0,
        part: slice = slice(None),
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.position = start
        self.part = part
        self.device = device
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield (images uint8 (B, H, W, C), labels int64 (B,) or None) for ever.

        The next batch is read in a thread while the caller works on this one.
        """
        with ThreadPoolExecutor(1, "fastdiff-batches", self._start_thread) as reader:
            pending = reader.submit(self._read, self._next_indices())
            while True:
                batch = pending.result()
                pending = reader.submit(self._read, self._next_indices())
                yield batch

    def _next_indices(self) -> np.ndarray:
        parts, missing = [], self.batch_size
        while missing:
            epoch, offset = divmod(self.position, len(self.dataset))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng((self.seed, epoch)).permutation(
                    len(self.dataset)
                )
            parts.append(self._order[offset : offset + missing])
            self.position += len(parts[-1])
            missing -= len(parts[-1])
        return np.concatenate(parts)[self.part]

    def _start_thread(self) -> None:
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # memory is pinned by the current device's context

    def _read(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        images = torch.from_numpy(self.dataset.read(indices))
        labels = self.dataset.labels
        labels = None if labels is None else torch.from_numpy(labels[indices])
        if self.device.type == "cuda":
            return images.pin_memory(), None if labels is None else labels.pin_memory()
        return images, labels


def _digits() -> ArrayDataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels 0..16 spread over the bytes 0..255.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return ArrayDataset(images, digits.target.astype(np.int64), tuple("0123456789"))


def _built_in(data: str, data_dir: str | None, split: Split):
    """Images, labels and classes in the first place that has the dataset's files."""
    _, read, classes = _FILES[data]
    for folder in _places(data, data_dir):
        found = read(folder, split)
        if found is not None:
            return *found, classes
    where = printable(data_dir) if data_dir is not None else " or ".join(USUAL_PLACES)
    raise UserError(
        f"--data {data}: its {split} files are not in {where}; give their folder with --data-dir, "
        "or add --download (which needs torchvision)"
    )


def _places(data: str, data_dir: str | None) -> list[Path]:
    roots = [Path(data_dir)] if data_dir is not None else [Path(p) for p in USUAL_PLACES]
    return [root / sub for root in roots for sub in ("", data, *_FILES[data][0])]


def _folder(folder: Path, image_size, channels, warn) -> Dataset:
    images, labels, classes = folders.find(folder, warn)
    shown = printable(folder)

    def named(labels, classes):
        if labels is None:
            return labels, classes
        return folders.without_empty_classes(shown, labels, classes, warn)

    return _decoded(shown, images, labels, classes, image_size, channels, warn, named)


def _decoded(
    data, images, labels, classes, image_size, channels, warn, named=lambda *pair: pair
) -> Dataset:
    """Encoded images as a dataset: in memory if they fit, else decoded when they are needed.

    ``named`` settles labels and classes each time that images were found to be unusable.
    """
    dataset = EncodedDataset.checked(data, images, labels, classes, image_size, channels, warn)
    dataset.set_classes(*named(dataset.labels, dataset.classes))
    if dataset.num_bytes > IN_MEMORY_BYTES:
        dataset.look_at_depth()
        return dataset
    # The files, whose names and sizes are the same wherever and with whatever they are decoded.
    files = dataset.identity
    pixels, labels = dataset.decode_all()
    return ArrayDataset(pixels, *named(labels, dataset.classes), files)


def _converted(data: str, images: np.ndarray, channels: int) -> np.ndarray:
    """Arrays (N, H, W, C) in grey or RGB; encoded images are decoded to it."""
    if images.shape[3] not in (1, 3):
        raise UserError(
            f"--channels: images of --data {printable(data)} have {images.shape[3]}, not 1 or 3"
        )
    if channels == 3:
        return np.repeat(images, 3, axis=3)
    grey = np.empty((*images.shape[:3], 1), np.uint8)
    for image, out in zip(images, grey, strict=True):  # one by one: 32 bits for all may be too much
        out[..., 0] = (image @ _LUMA + 0x8000) >> 16
    return grey
