"""Readers of dataset files: IDX, CIFAR-10's two formats, .npz. Nothing read runs code."""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastdiff.training.errors import UserError, one_line, printable

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

# Names of the images and of the labels in an .npz file.
_NPZ_NAMES = (("images", "arr_0"), ("labels", "arr_1"))
_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

# Deflate shrinks nothing more than 1032 times. Images, even of black and white shapes, stay below
# a hundred; and a small file is harmless whatever it claims.
_MOST_EXPANSION = 100
_UNPACKED_ALWAYS = 1 << 28

_LARGEST_BATCH = 1 << 26

# Every class up to the highest label gets a name and an embedding; no dataset of images comes near
# this, a damaged or unrelated array of integers does.
MAX_CLASSES = 1 << 16


def read_idx_pair(folder: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray] | None:
    """Read MNIST's files, plain or .gz: images (N, H, W, 1), labels (N,); None if absent."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _plain_or_gz(folder / f"{prefix}-images-idx3-ubyte")
    labels = _plain_or_gz(folder / f"{prefix}-labels-idx1-ubyte")
    if images is None or labels is None:
        return None
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    _same_length(pixels, classes, images)
    _check_ten_classes(classes, labels)
    return pixels[..., None], classes.astype(np.int64)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of bytes with ``ndim`` dimensions.

    The header is 0, 0, type (8 = unsigned byte), number of dimensions, then each length as a
    big-endian 32-bit integer. No more is unpacked than the header declares.
    """
    shown = printable(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * ndim)
            if header[:4] != bytes((0, 0, 8, ndim)):
                raise UserError(
                    f"--data-dir: {printable(path)} is not an IDX file of {ndim}-d bytes"
                )
            shape = tuple(
                int.from_bytes(header[i : i + 4], "big") for i in range(4, 4 + 4 * ndim, 4)
            )
            size = math.prod(shape)
            _check_unpacked_size(f"--data-dir: {shown}", path.stat().st_size, size)
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise UserError(f"--data-dir: cannot read {shown}: {one_line(error)}") from error
    if len(content) != size:
        raise UserError(f"--data-dir: {shown} is damaged: its length does not match its header")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_cifar10(folder: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray] | None:
    """Read CIFAR-10's batches, python (torchvision's) or binary format; None if absent."""
    names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}[split]
    for suffix, read in (("", _cifar10_pickle), (".bin", _cifar10_binary)):
        paths = [folder / (name + suffix) for name in names]
        if all(os.path.isfile(path) for path in paths):
            parts = [read(path) for path in paths]
            pixels = np.concatenate([pixels for pixels, _ in parts])
            labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
            _check_ten_classes(labels, folder)
            # Stored plane by plane (CHW).
            images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            return np.ascontiguousarray(images), labels
    return None


def read_npz(
    path: Path, warn: Callable[[str], None] = warnings.warn
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Read images and, if there, labels of an .npz file (never unpickling).

    Images are the array named "images" or "arr_0", uint8 (N, H, W) or (N, H, W, C); labels,
    "labels" or "arr_1", are integers (N,) from 0 to at most `MAX_CLASSES` - 1. Other arrays are
    not read, and these two only after what their headers declare was found to be true.
    """
    what = f"--data {printable(path)}"
    if not os.path.isfile(path):  # to open a pipe would wait for somebody to write to it
        raise UserError(f"{what}: not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            found = [next((n for n in pair if n in names), None) for pair in _NPZ_NAMES]
            if found[0] is None:
                has = ", ".join(map(printable, sorted(names)[:10]))
                raise UserError(
                    f"{what}: no array named 'images' or 'arr_0'; has {has or 'nothing'}"
                )
            images, labels = (
                None if name is None else _read_npy(archive, f"{name}.npy", what) for name in found
            )
    except UserError:
        raise
    except Exception as error:
        # What zipfile, zlib and NumPy raise on bytes they did not expect is not a documented set.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        # NumPy advises to unpickle what it cannot read, which could run code.
        advice = "allow_pickle" in str(error) or "pickle" in str(error)
        raise UserError(
            f"{what}: not a readable .npz file: "
            f"{'no array of numbers' if advice else one_line(reason)}"
        ) from error
    given = images
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] > 4 or not images.size:
        raise UserError(
            f"{what}: expected images as uint8 (N, H, W, C) with 1 to 4 channels, got "
            f"{_described(given)}{_remedy(given)}"
        )
    if labels is None:
        return images, None, ()
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{what}: expected labels as integers (N,), got {_described(labels)}")
    _same_length(images, labels, path)
    if not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise UserError(
            f"{what}: expected labels from 0 to at most {MAX_CLASSES - 1}, got "
            f"{labels.min()}..{labels.max()}"
        )
    num_classes, present = int(labels.max()) + 1, len(np.unique(labels))
    if present < num_classes:
        warn(
            f"{what}: labels 0..{num_classes - 1} make {num_classes} classes, but only {present} "
            "of them have images; number them without gaps if no others are to come"
        )
    return images, labels.astype(np.int64), tuple(map(str, range(num_classes)))


def _described(array: np.ndarray) -> str:
    """Dtype and shape, without the names that a structured dtype has."""
    kind = "structured" if array.dtype.kind == "V" else str(array.dtype)
    return f"{kind} {array.shape}"


def _remedy(images: np.ndarray) -> str:
    """What turns an array into one that can be read, if that is likely to be known."""
    if not images.size:
        return ", which holds no pixel"
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            return ", some of them NaN or infinite"
        low, high = images.min(), images.max()
        if low >= 0 and high <= 1:
            return "; for values in 0..1: (images * 255).round().astype('uint8')"
        if low >= -1 and high <= 1:
            return "; for values in -1..1: ((images + 1) * 127.5).round().astype('uint8')"
        return f" of {low:.6g}..{high:.6g}; scale them to 0..255 and convert them to uint8"
    if images.dtype.kind in "iub" and images.dtype != np.uint8:
        low, high = int(images.min()), int(images.max())
        return f" of {low}..{high}; scale them to 0..255 and convert them to uint8"
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] <= 4:
        return "; for the order N, C, H, W: images.transpose(0, 2, 3, 1)"
    return ""


def _read_npy(archive: zipfile.ZipFile, member: str, what: str) -> np.ndarray:
    """Read one array of an .npz file: first its header, then what that declares."""
    info = archive.getinfo(member)
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _READ_HEADER:
            raise UserError(f"{what}: {member} is of an unknown version {version}")
        shape, _, dtype = _READ_HEADER[version](file)
        if any(length < 0 for length in shape):
            raise UserError(f"{what}: {member} is damaged: its header declares the shape {shape}")
        if dtype.hasobject:
            raise UserError(
                f"{what}: refused to load {member}, which holds pickled Python objects: loading "
                "them could run code; save it as an array of numbers"
            )
        size = math.prod(shape) * dtype.itemsize
        if size != info.file_size - file.tell():
            raise UserError(
                f"{what}: {member} is damaged: its header declares {dtype} {shape}, {size} bytes, "
                f"but it holds {info.file_size - file.tell()}"
            )
        _check_unpacked_size(f"{what}: {member}", info.compress_size, size)
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_unpacked_size(what: str, packed: int, unpacked: int) -> None:
    """Refuse, before it is unpacked, what would fill the memory."""
    if unpacked > _UNPACKED_ALWAYS and unpacked > _MOST_EXPANSION * packed:
        raise UserError(
            f"{what}: refused to unpack {packed} bytes to {unpacked}, which images do not; it may "
            "be a decompression bomb"
        )
    memory = memory_bytes()
    if memory is not None and unpacked > memory:
        raise UserError(
            f"{what}: {unpacked / 2**30:.1f} GiB of pixels do not fit into the memory, "
            f"{memory / 2**30:.1f} GiB; a folder of image files is read piece by piece"
        )


def memory_bytes() -> int | None:
    """Size of the machine's memory; None where it cannot be asked for."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _cifar10_pickle(path: Path) -> tuple[np.ndarray, list[int]]:
    _check_batch_size(path)
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), [int(i) for i in batch[b"labels"]]
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
            raise ValueError(f"unexpected data {pixels.dtype} {pixels.shape}")
    except Exception as error:
        # A crafted pickle can raise anything.
        raise UserError(
            f"--data-dir: {printable(path)} is not a CIFAR-10 batch in python format: "
            f"{one_line(error)}"
        ) from error
    return pixels, labels


def _cifar10_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    _check_batch_size(path)
    content = np.fromfile(path, np.uint8)
    if content.size % 3073:
        raise UserError(
            f"--data-dir: {printable(path)} is damaged: not a whole number of 3073-byte records"
        )
    records = content.reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


def _check_batch_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _LARGEST_BATCH:
        raise UserError(
            f"--data-dir: {printable(path)} is no CIFAR-10 batch: it has {size} bytes, those have "
            "31 million"
        )


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
        if os.path.isfile(candidate):
            return candidate
    return None


def _check_ten_classes(labels: np.ndarray, path: Path) -> None:
    if labels.size and not 0 <= labels.min() <= labels.max() <= 9:
        raise UserError(f"--data-dir: labels outside 0..9 in {printable(path)}")


def _same_length(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    if len(images) != len(labels):
        raise UserError(f"{printable(path)}: {len(images)} images but {len(labels)} labels")
