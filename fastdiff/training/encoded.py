"""Datasets of encoded images: which of them can be used, and decoding them in a pool of threads."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.training import identity
from fastdiff.training.errors import RunError, UserError, printable
from fastdiff.training.image_files import Header, UnusableImage, decode, read_header

# Images that cannot be used are named up to this many, the others counted.
_NAMED = 3

# Images of 16 bits are taken for ones of fewer if none of them is brighter: a quarter of white.
_DARK = (1 << 14) - 1
# Of a dataset that is not decoded at once, this many are looked at.
_LOOKED_AT = 64


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images by index.

    Attributes
    ----------
    sources : sequence of Path or bytes
        Files or their contents; any number of threads may ask for one.
    names : sequence of str
        What messages call them, without anything that a terminal would obey.
    keys : sequence of str
        What tells them from each other wherever the dataset lies: names below its folder.
    """

    sources: Sequence[Path | bytes]
    names: Sequence[str]
    keys: Sequence[str]

    def __len__(self) -> int:
        return len(self.sources)

    def short_name(self, index: int) -> str:
        """The name of a file without its folder."""
        source = self.sources[index]
        return printable(source.name) if isinstance(source, Path) else self.names[index]


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
        headers: Sequence[Header],
    ) -> None:
        self.data = data
        self.images = images
        self.chosen = chosen
        self.headers = headers
        self.shape = shape
        self.set_classes(labels, classes)
        self.warn = warn
        self.damaged: dict[int, str] = {}
        """Why an image could not be decoded, by index: those found so far."""
        self.brightest: list[int] = []
        """The highest values found in images of 16 bits."""
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
        if not len(images):
            raise UserError(f"--data {data}: there is no image in it")
        with ThreadPoolExecutor(_num_workers()) as pool:
            headers = list(pool.map(lambda i: _try(read_header, images, i), range(len(images))))
        good = [i for i, header in enumerate(headers) if not isinstance(header, UnusableImage)]
        bad = {i: str(h) for i, h in enumerate(headers) if isinstance(h, UnusableImage)}
        _report(data, images, bad, len(images), warn)
        _report_later_pictures(data, images, {i: headers[i].pictures for i in good}, warn)
        if image_size is None:
            width, height = headers[good[0]].size
            for i in good:
                if headers[i].size != (width, height):
                    raise UserError(
                        f"--data {data}: images of mixed sizes: {images.short_name(good[0])} is "
                        f"{width}x{height}, {images.short_name(i)} is {headers[i].size[0]}x"
                        f"{headers[i].size[1]}; give one size with --image-size"
                    )
        else:
            width = height = image_size
        if channels is None:
            channels = 1 if all(headers[i].grey for i in good) else 3
        chosen, shape = np.array(good), (height, width, channels)
        labels = None if labels is None else labels[chosen]
        used = [headers[i] for i in good]
        return cls(data, images, chosen, shape, labels, classes, warn, used)

    def __len__(self) -> int:
        return len(self.chosen)

    def set_classes(self, labels: np.ndarray | None, classes: tuple[str, ...]) -> None:
        """Put other labels (N,) and classes in place of those there."""
        self.labels, self.classes, self.num_classes = labels, classes, len(classes)

    @property
    def num_bytes(self) -> int:
        """Size of all images when decoded."""
        height, width, channels = self.shape
        return len(self) * height * width * channels

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What makes these images the same wherever they are."""
        keys = (self.images.keys[i] for i in self.chosen)
        sizes = (header.num_bytes for header in self.headers)
        return identity.of_files(keys, sizes, self.labels)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Decode images to uint8 (B, H, W, C).

        Raises
        ------
        RunError
            None of the images of a class, or of all, can be read any more.
        """
        return np.stack(list(self._pool.map(self._decode_or_replace, indices)))

    def decode_all(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Decode all images, leaving out (and reporting) damaged ones: images, labels."""
        decoded = np.empty((len(self), *self.shape), np.uint8)

        def decode_into(index: int) -> UnusableImage | None:
            pixels = self._decode(index)
            if isinstance(pixels, UnusableImage):
                return pixels
            decoded[index] = pixels
            return None

        errors = list(self._pool.map(decode_into, range(len(self))))
        self._warn_if_dark()
        bad = {int(self.chosen[i]): str(e) for i, e in enumerate(errors) if e is not None}
        if not bad:
            return decoded, self.labels
        _report(self.data, self.images, bad, len(self), self.warn)
        good = np.array([error is None for error in errors])
        return decoded[good], None if self.labels is None else self.labels[good]

    def look_at_depth(self) -> None:
        """Decode some images of 16 bits, to see whether they use them."""
        deep = [i for i, header in enumerate(self.headers) if header.deep]
        some = deep[:: max(1, len(deep) // _LOOKED_AT)]
        list(self._pool.map(self._decode, some))
        self._warn_if_dark()

    def _warn_if_dark(self) -> None:
        highest = max(self.brightest, default=_DARK + 1)
        if highest > _DARK:
            return
        bits = max(8, highest.bit_length())
        self.warn(
            f"--data {self.data}: the brightest value in {len(self.brightest)} images of 16 bits "
            f"is {highest} of 65535, so that they are nearly black; if they hold {bits} bits, "
            f"multiply them by {1 << (16 - bits)} or convert them to 8 bits"
        )

    def _decode(self, index: int) -> np.ndarray | UnusableImage:
        note = self.brightest.append  # of a list, which threads may share
        return _try(decode, self.images, self.chosen[index], self.shape, note)

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
        raise RunError(
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


def _report_later_pictures(
    data: str, images: EncodedImages, pictures: dict[int, int], warn: Callable[[str], None]
) -> None:
    """Say how many pages and frames are not read."""
    several = [i for i, number in pictures.items() if number > 1]
    if not several:
        return
    more = sum(pictures[i] - 1 for i in several)
    named = ", ".join(images.short_name(i) for i in several[:_NAMED])
    if len(several) > _NAMED:
        named += f" and {len(several) - _NAMED} more"
    warn(
        f"--data {data}: {more} later {'page or frame' if more == 1 else 'pages or frames'} of "
        f"{len(several)} of {len(images)} images are not read, the first one of each is: {named}"
    )


def _num_workers() -> int:
    return min(16, os.cpu_count() or 1)
