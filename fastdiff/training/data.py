"""Images to train on, uint8 from the file to the device, and the order they come in.

A dataset is anything with ``__len__``, ``shape`` (H, W, C), ``labels``, ``num_classes`` and
``read(indices) -> uint8 (B, H, W, C)``. `load_dataset` makes one from the value of ``--data``;
`Batches` walks through it in seeded random order from any position.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fastdiff.training.archives import CIFAR10_CLASSES, read_cifar10, read_idx_pair, read_npz
from fastdiff.training.config import BUILT_IN_DATA
from fastdiff.training.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

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

# Where Debian's dataset-fashion-mnist and torchvision (run from the project's folder) put files.
USUAL_PLACES = ("data", "/usr/share/datasets")

_EXIF_ORIENTATION = 0x0112

# A folder that decodes to less than this is decoded once and kept; a larger one, batch by batch.
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
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.images = images
        self.labels = labels
        self.classes = classes
        self.shape: tuple[int, int, int] = images.shape[1:]
        self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return images as uint8 (B, H, W, C)."""
        return self.images[indices]


class FolderDataset:
    """Images decoded from files when they are asked for, by a pool of threads."""

    def __init__(
        self,
        paths: list[Path],
        shape: tuple[int, int, int],
        labels: np.ndarray | None,
        classes: tuple[str, ...],
    ) -> None:
        self.paths = paths
        self.shape = shape
        self.labels = labels
        self.classes = classes
        self.num_classes = len(classes)
        self._pool = ThreadPoolExecutor(_num_workers(), thread_name_prefix="fastdiff-decode")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Decode images to uint8 (B, H, W, C)."""
        decode = self._pool.map(lambda i: _decode(self.paths[i], self.shape), indices)
        return np.stack(list(decode))


Dataset = ArrayDataset | FolderDataset


def load_dataset(data: str, data_dir: str | None = None, image_size: int | None = None) -> Dataset:
    """Load what ``--data`` names.

    Parameters
    ----------
    data : str
        "digits", "fashion-mnist", "cifar10", a folder of images, or an .npz file.
    data_dir : str, optional
        Where the files of fashion-mnist and cifar10 are.
    image_size : int, optional
        For a folder: resize and centre-crop every image to this size.

    Raises
    ------
    UserError
        For an unknown name and for files that are missing, unreadable or of mixed sizes.
    """
    path = Path(data)
    if data not in BUILT_IN_DATA and not path.exists():
        raise UserError(
            f"--data {data}: no such dataset, folder or file; give one of "
            f"{', '.join(BUILT_IN_DATA)}, a folder of images, or an .npz file"
        )
    if image_size is not None and (data in BUILT_IN_DATA or not path.is_dir()):
        raise UserError(f"--image-size applies to a folder of images, not to --data {data}")
    if data == "digits":
        return _digits()
    if data == "fashion-mnist":
        images, labels = _first_found(data, data_dir, ("FashionMNIST/raw",), read_idx_pair)
        return ArrayDataset(images, labels, FASHION_MNIST_CLASSES)
    if data == "cifar10":
        layouts = ("cifar-10-batches-py", "cifar-10-batches-bin")
        return ArrayDataset(*_first_found(data, data_dir, layouts, read_cifar10), CIFAR10_CLASSES)
    if path.is_dir():
        return _folder(path, image_size)
    if path.suffix == ".npz":
        return ArrayDataset(*read_npz(path))
    raise UserError(f"--data {data}: neither a folder of images nor an .npz file")


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
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        start: int = 0,
        part: slice = slice(None),
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.position = start
        self.part = part
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield (images uint8 (B, H, W, C), labels int64 (B,) or None) for ever.

        The next batch is read in a thread while the caller works on this one.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="fastdiff-batches") as reader:
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

    def _read(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        images = torch.from_numpy(self.dataset.read(indices))
        labels = self.dataset.labels
        return images, None if labels is None else torch.from_numpy(labels[indices])


def _digits() -> ArrayDataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels 0..16 spread over the bytes 0..255.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return ArrayDataset(images, digits.target.astype(np.int64), tuple("0123456789"))


def _first_found(data, data_dir, layouts, read):
    """Return ``read(folder)`` for the first place that has the dataset's files."""
    roots = [Path(data_dir)] if data_dir is not None else [Path(p) for p in USUAL_PLACES]
    folders = [root / sub for root in roots for sub in ("", data, *layouts)]
    for folder in folders:
        found = read(folder)
        if found is not None:
            return found
    where = data_dir if data_dir is not None else " or ".join(USUAL_PLACES)
    raise UserError(
        f"--data {data}: its files are not in {where}; download them and give their folder "
        "with --data-dir"
    )


def _folder(folder: Path, image_size: int | None) -> Dataset:
    paths = _image_paths(folder)
    with ThreadPoolExecutor(_num_workers()) as pool:
        headers = list(pool.map(_read_header, paths))
    if image_size is None:
        first = headers[0][0]
        for path, (size, _) in zip(paths, headers, strict=True):
            if size != first:
                raise UserError(
                    f"--data {folder}: images of mixed sizes: {paths[0].name} is "
                    f"{first[0]}x{first[1]}, {path.name} is {size[0]}x{size[1]}; "
                    "give one size with --image-size"
                )
        width, height = first
    else:
        width = height = image_size
    channels = 1 if all(mode in ("1", "L", "LA") for _, mode in headers) else 3

    labels, classes = None, ()
    if all(path.parent != folder for path in paths):
        names = [path.relative_to(folder).parts[0] for path in paths]
        classes = tuple(sorted(set(names)))
        labels = np.array([classes.index(name) for name in names], np.int64)

    dataset = FolderDataset(paths, (height, width, channels), labels, classes)
    if len(paths) * height * width * channels > IN_MEMORY_BYTES:
        return dataset
    return ArrayDataset(dataset.read(np.arange(len(paths))), labels, classes)


def _image_paths(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"--data {folder}: cannot read {error.filename}: {error.strerror}")

    paths = sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
    if not paths:
        raise UserError(
            f"--data {folder}: no images found in the folder; files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} are read"
        )
    return paths


def _open(path: Path):
    from PIL import Image

    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"--data: cannot read the image {path}: {error}") from error


def _read_header(path: Path) -> tuple[tuple[int, int], str]:
    with _open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(
                f"--data: {path} has more than 8 bits per channel ({image.mode}); "
                "convert it to 8 bits first"
            )
        try:
            orientation = image.getexif().get(_EXIF_ORIENTATION)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"--data: cannot read the image {path}: {error}") from error
        on_its_side = orientation in (5, 6, 7, 8)
        return image.size[::-1] if on_its_side else image.size, image.mode


def _decode(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image: upright as its EXIF says, and what is transparent in it on white."""
    from PIL import Image, ImageOps

    height, width, channels = shape
    with _open(path) as image:
        try:
            pixels = ImageOps.exif_transpose(image)
            if "A" in pixels.getbands() or "transparency" in pixels.info:
                pixels = pixels.convert("RGBA")
                white = Image.new("RGBA", pixels.size, "white")
                pixels = Image.alpha_composite(white, pixels)
            pixels = pixels.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"--data: cannot read the image {path}: {error}") from error
    if pixels.size != (width, height):
        pixels = ImageOps.fit(pixels, (width, height))
    return np.asarray(pixels).reshape(shape)


def _num_workers() -> int:
    return min(16, os.cpu_count() or 1)
