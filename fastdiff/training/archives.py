"""Readers of dataset files: IDX, CIFAR-10's two formats, .npz. Nothing read runs code."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastdiff.training.errors import UserError

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


# Every class up to the highest label gets a name and an embedding; no dataset of images comes near
# this, a damaged or unrelated array of integers does.
MAX_CLASSES = 1 << 16


def read_idx_pair(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Read MNIST's training files, plain or .gz: images (N, H, W, 1), labels; None if absent."""
    images = _plain_or_gz(folder / "train-images-idx3-ubyte")
    labels = _plain_or_gz(folder / "train-labels-idx1-ubyte")
    if images is None or labels is None:
        return None
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    _same_length(pixels, classes, images)
    _check_ten_classes(classes, labels)
    return pixels[..., None], classes.astype(np.int64)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of bytes with ``ndim`` dimensions.

    The header is 0, 0, type (8 = unsigned byte), number of dimensions, then each length as a
    big-endian 32-bit integer.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise UserError(f"--data-dir: cannot read {path}: {error}") from error
    header = 4 + 4 * ndim
    if content[:4] != bytes((0, 0, 8, ndim)):
        raise UserError(f"--data-dir: {path} is not an IDX file of {ndim}-d bytes")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    if len(content) != header + math.prod(shape):
        raise UserError(f"--data-dir: {path} is damaged: its length does not match its header")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Read CIFAR-10's five training batches, python or binary format; None if absent."""
    for suffix, read in (("", _cifar10_pickle), (".bin", _cifar10_binary)):
        paths = [folder / f"data_batch_{i}{suffix}" for i in range(1, 6)]
        if all(path.is_file() for path in paths):
            parts = [read(path) for path in paths]
            pixels = np.concatenate([pixels for pixels, _ in parts])
            labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
            _check_ten_classes(labels, folder)
            # Stored plane by plane (CHW).
            images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            return np.ascontiguousarray(images), labels
    return None


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Read images and, if there, labels of an .npz file (never unpickling).

    Images are the array named "images" or "arr_0", uint8 (N, H, W) or (N, H, W, C); labels,
    "labels" or "arr_1", are integers (N,) from 0 to at most `MAX_CLASSES` - 1.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        # What zipfile, zlib and NumPy raise on bytes they did not expect is not a documented set.
        raise UserError(f"--data {path}: not a readable .npz file: {error}") from error
    images = arrays.get("images", arrays.get("arr_0"))
    labels = arrays.get("labels", arrays.get("arr_1"))
    if images is None:
        raise UserError(f"--data {path}: no array named 'images' or 'arr_0'; has {list(arrays)}")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] > 4 or not images.size:
        raise UserError(
            f"--data {path}: expected images as uint8 (N, H, W, C) with 1 to 4 channels, got "
            f"{images.dtype} {images.shape}"
        )
    if labels is None:
        return images, None, ()
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"--data {path}: expected labels as integers (N,)")
    _same_length(images, labels, path)
    if not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise UserError(
            f"--data {path}: expected labels from 0 to at most {MAX_CLASSES - 1}, got "
            f"{labels.min()}..{labels.max()}"
        )
    classes = tuple(str(i) for i in range(int(labels.max()) + 1))
    return images, labels.astype(np.int64), classes


def _cifar10_pickle(path: Path) -> tuple[np.ndarray, list[int]]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), [int(i) for i in batch[b"labels"]]
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
            raise ValueError(f"unexpected data {pixels.dtype} {pixels.shape}")
    except Exception as error:
        # A crafted pickle can raise anything.
        raise UserError(
            f"--data-dir: {path} is not a CIFAR-10 batch in python format: {error}"
        ) from error
    return pixels, labels


def _cifar10_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(path, np.uint8)
    if content.size % 3073:
        raise UserError(f"--data-dir: {path} is damaged: not a whole number of 3073-byte records")
    records = content.reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers and NumPy arrays, and refuses to look up anything else."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        # Both names of one function: before and since NumPy 2.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return self._ALLOWED[module, name]


def _plain_or_gz(path: Path) -> Path | None:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    return None


def _check_ten_classes(labels: np.ndarray, path: Path) -> None:
    if labels.size and not 0 <= labels.min() <= labels.max() <= 9:
        raise UserError(f"--data-dir: labels outside 0..9 in {path}")


def _same_length(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    if len(images) != len(labels):
        raise UserError(f"{path}: {len(images)} images but {len(labels)} labels")
