"""Datasets of encoded images: which of them can be used, and decoding them in a pool of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdiff.training.errors import UserError
from fastdiff.training.image_files import UnusableImage, decode, read_header

# Images that cannot be used are named up to this many, the others counted.
_NAMED = 3


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images by index.

    Attributes
    ----------
    sources : sequence of Path or bytes
        Files or their contents; any number of threads may ask for one.
    names : sequence
        What messages call them.
    """

    sources: Sequence[Path | bytes]
    names: Sequence[object]

    def __len__(self) -> int:
        return len(self.sources)


class EncodedDataset:
    """Images decoded when they are asked for.

    One that turns out to be damaged gives its place to the next one (of the same class), so that
    the others keep their order whoever reads them; `checked` already leaves out those that have no
    readable header.
    """

    def __init__(
        self,
        data: str,
        images: EncodedImages,
        chosen: np.ndarray,
        shape: tuple[int, int, int],
        labels: np.ndarray | None,
        classes: tuple[str, ...],
        warn: Callable[[str], None],
    ) -> None:
        self.data = data
        self.images = images
        self.chosen = chosen
        self.shape = shape
        self.labels = labels
        self.classes = classes
        self.num_classes = len(classes)
        self.warn = warn
        self.damaged: dict[int, str] = {}
        """Why an image could not be decoded, by index: those found so far."""
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_num_workers(), thread_name_prefix="fastdiff-decode")

    @classmethod
    def checked(
        cls,
        data: str,
        images: EncodedImages,
        labels: np.ndarray | None,
        classes: tuple[str, ...],
        image_size: int | None,
        channels: int | None,
        warn: Callable[[str], None],
    ) -> EncodedDataset:
        """Read all headers, leave out (and report) what has none, and require one size.

        Parameters
        ----------
        data : str
            The value of --data, for messages.
        images : EncodedImages
            All of them.
        labels, classes
            int64 (N,) and the classes' names; or None and ().
        image_size : int, optional
            Height and width that images are resized to.
        channels : {1, 3}, optional
            What images are converted to; None: grey if all are, else RGB.
        warn : callable
            Is told which images are left out.
        """
        with ThreadPoolExecutor(_num_workers()) as pool:
            headers = list(pool.map(lambda i: _try(read_header, images, i), range(len(images))))
        good = [i for i, header in enumerate(headers) if not isinstance(header, UnusableImage)]
        bad = {i: str(h) for i, h in enumerate(headers) if isinstance(h, UnusableImage)}
        _report(data, images, bad, len(images), warn)
        if image_size is None:
            width, height = headers[good[0]][0]
            for i in good:
                if headers[i][0] != (width, height):
                    first, other = images.names[good[0]], images.names[i]
                    raise UserError(
                        f"--data {data}: images of mixed sizes: {_short(first)} is "
                        f"{width}x{height}, {_short(other)} is {headers[i][0][0]}x"
                        f"{headers[i][0][1]}; give one size with --image-size"
                    )
        else:
            width = height = image_size
        if channels is None:
            channels = 1 if all(headers[i][1] for i in good) else 3
        chosen = np.array(good)
        labels = None if labels is None else labels[chosen]
        return cls(data, images, chosen, (height, width, channels), labels, classes, warn)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def num_bytes(self) -> int:
        """Size of all images when decoded."""
        height, width, channels = self.shape
        return len(self) * height * width * channels

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Decode images to uint8 (B, H, W, C)."""
        return np.stack(list(self._pool.map(self._decode_or_replace, indices)))

    def decode_all(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Decode all images, leaving out (and reporting) damaged ones: images, labels."""
        decoded = np.empty((len(self), *self.shape), np.uint8)

        def decode_into(index: int) -> UnusableImage | None:
            pixels = _try(decode, self.images, self.chosen[index], self.shape)
            if isinstance(pixels, UnusableImage):
                return pixels
            decoded[index] = pixels
            return None

        errors = list(self._pool.map(decode_into, range(len(self))))
        bad = {int(self.chosen[i]): str(e) for i, e in enumerate(errors) if e is not None}
        if not bad:
            return decoded, self.labels
        _report(self.data, self.images, bad, len(self), self.warn)
        good = np.array([error is None for error in errors])
        return decoded[good], None if self.labels is None else self.labels[good]

    def _decode_or_replace(self, index: int) -> np.ndarray:
        candidates = (index + np.arange(len(self))) % len(self)
        if self.labels is not None:
            candidates = candidates[self.labels[candidates] == self.labels[index]]
        for i in candidates:
            if i in self.damaged:
                continue
            pixels = _try(decode, self.images, self.chosen[i], self.shape)
            if not isinstance(pixels, UnusableImage):
                return pixels
            self._note_damaged(int(i), str(pixels))
        raise UserError(
            f"--data {self.data}: none of {len(candidates)} images can be read, such as "
            f"{self.images.names[self.chosen[index]]} ({self.damaged[index]})"
        )

    def _note_damaged(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self.damaged:  # another thread was there first
                return
            self.damaged[index] = reason
            found = len(self.damaged)
        if found <= _NAMED or not found & (found - 1):  # later ones at powers of two
            self.warn(
                f"--data {self.data}: cannot read the image "
                f"{self.images.names[self.chosen[index]]} ({reason}); another takes its place "
                f"({found} so far)"
            )


def _try(work, images: EncodedImages, index: int, *args):
    """``work(source, name, *args)``, or why the image cannot be used."""
    try:
        return work(images.sources[index], str(images.names[index]), *args)
    except UnusableImage as error:
        return error


def _report(
    data: str,
    images: EncodedImages,
    bad: dict[int, str],
    total: int,
    warn: Callable[[str], None],
) -> None:
    """Say which images are left out; `UserError` if that leaves none."""
    if not bad:
        return
    named = [f"{images.names[i]} ({reason})" for i, reason in list(bad.items())[:_NAMED]]
    listed = ", ".join(named)
    if len(bad) > _NAMED:
        listed += f" and {len(bad) - _NAMED} more"
    if len(bad) == total:
        raise UserError(f"--data {data}: none of {total} images can be read: {listed}")
    warn(f"--data {data}: skipped {len(bad)} of {total} images that cannot be read: {listed}")


def _short(name: object) -> str:
    return name.name if isinstance(name, Path) else str(name)


def _num_workers() -> int:
    return min(16, os.cpu_count() or 1)
