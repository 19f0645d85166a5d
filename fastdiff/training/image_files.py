"""Image files as uint8 arrays, of any mode, upright and opaque; and why one cannot be used."""

from __future__ import annotations

import functools
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdiff.training.errors import UserError, one_line

# A file's content decides on its decoder, whatever its name: among these, which begin with a mark
# of their own. Pillow's other formats are tried on files with their ending alone: many are told
# from anything else by one byte or none.
_ANYWHERE = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Vector graphics (the decoder of EPS starts Ghostscript on the file), video, and what Pillow can
# name but not decode by itself.
_NEVER = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"))

# Where more than one picture in a file means more than one picture. In others these are layers,
# sizes, or a phone's previews.
_SEQUENCES = frozenset(("AVIF", "DCX", "FLI", "GIF", "PNG", "TIFF", "WEBP"))

_GREY_MODES = frozenset(("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"))
_EXIF_ORIENTATION = 0x0112
_SAMPLE_FORMAT, _SIGNED = 0x0153, 2


class UnusableImage(ValueError):
    """Why an image cannot be used: cut off, damaged, or of pixels without a known range."""


class Header(NamedTuple):
    """What is known of an image before it is decoded."""

    size: tuple[int, int]
    """Width and height when it is upright."""
    grey: bool
    deep: bool
    """Whether it has 16 bits per channel."""
    pictures: int
    """Pages of a TIFF, frames of an animation; the first is read."""
    num_bytes: int
    """Size of the file."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Endings of the names of files that this Pillow can decode."""
    return frozenset(_formats_by_suffix())


def read_header(source: Path | bytes, name: str) -> Header:
    """Return what is known of an image before it is decoded.

    Parameters
    ----------
    source : Path or bytes
        A file, or its content.
    name : str
        What messages call it.

    Raises
    ------
    UnusableImage
        The file cannot be read or is no image.
    UserError
        It declares more pixels than are safe to decode.
    """

    def header(image):
        if image.mode == "F":
            raise UnusableImage("floating-point pixels have no known range; convert it to 8 bits")
        if image.format == "TIFF" and image.mode == "L" and _is_signed(image):
            raise UnusableImage("signed pixels have no known range; convert it to unsigned ones")
        # To look for EXIF behind the pixels, where it hardly ever is, Pillow decodes a whole PNG.
        has_exif = image.format != "PNG" or "exif" in image.info
        on_its_side = has_exif and image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
        return Header(
            image.size[::-1] if on_its_side else image.size,
            image.mode in _GREY_MODES,
            _is_deep(image),
            _num_pictures(image),
            len(source) if isinstance(source, bytes) else os.stat(source).st_size,
        )

    return _with_image(source, name, header)


def decode(
    source: Path | bytes,
    name: str,
    shape: tuple[int, int, int],
    brightest: Callable[[int], None] = lambda value: None,
) -> np.ndarray:
    """Decode an image to uint8 of ``shape`` (H, W, C), C = 1 or 3.

    Upright as its EXIF says; what is transparent in it on white; 16 bits rounded to 8; resized to
    cover the shape and cropped at the centre if it is of another size. Parameters and errors as
    those of `read_header`; ``brightest`` is told the highest value (0..65535) in one of 16 bits.
    """
    height, width, channels = shape

    def pixels(image):
        from PIL import Image, ImageOps

        if _is_deep(image):
            brightest(_highest(image))
        image = _eight_bits(ImageOps.exif_transpose(image))
        if image.getbands()[-1] in "Aa" or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height))
        return np.asarray(image).reshape(shape)

    return _with_image(source, name, pixels)


def _eight_bits(image):
    """An image of at most 8 bits per channel: 0..65535 becomes 0..255."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    lowest, highest = values.min(), values.max()
    if lowest < 0:
        raise UnusableImage(
            f"pixels of {lowest}..{highest}: negative ones have no known range; convert it to "
            "unsigned ones"
        )
    # Mode I has 32 bits, but what opens as I, such as PGM, holds 16.
    if highest > 0xFFFF:
        raise UnusableImage(f"pixels of {lowest}..{highest}: more than 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _is_deep(image) -> bool:
    """Whether the file has 16 bits per channel; of colour, Pillow keeps the upper eight."""
    if image.mode.startswith("I"):
        return True
    arguments = image.tile[0][3] if image.tile else None
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return isinstance(raw_mode, str) and ";16" in raw_mode


def _highest(image) -> int:
    """The highest value in 16 bits; where Pillow kept the upper eight, the highest it can be."""
    if image.mode.startswith("I"):
        return int(np.asarray(image).max())
    return int(np.asarray(image.convert("RGB")).max()) * 256 + 255


def _is_signed(image) -> bool:
    return np.any(np.equal(image.tag_v2.get(_SAMPLE_FORMAT, 1), _SIGNED))


def _num_pictures(image) -> int:
    if image.format not in _SEQUENCES:
        return 1
    try:
        return max(1, int(getattr(image, "n_frames", 1)))
    except Exception:  # later pictures are damaged, which is nothing to the first
        return 1


def _with_image(source, name, work):
    """Return ``work(image)``, with every error that Pillow can raise turned into one of ours."""
    from PIL import Image, UnidentifiedImageError

    try:
        suffix = ""
        if not isinstance(source, bytes):
            # To open a pipe would wait for somebody to write to it, to read a device never ends.
            if not stat.S_ISREG(os.stat(source).st_mode):
                raise UnusableImage("not a regular file")
            suffix = Path(source).suffix.lower()
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_known_formats(suffix)) as image:
            return work(image)
    except UnusableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"--data: refused to decode {name}, which may be a decompression bomb: "
            f"{one_line(error)}; remove it, or scale it down if it is a picture"
        ) from error
    except Exception as error:
        # What Pillow raises on bytes it did not expect is not a documented set.
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image in a known format"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror  # without the name
        else:
            reason = one_line(error)
        raise UnusableImage(reason or type(error).__name__) from error


@functools.cache
def _known_formats(suffix: str) -> tuple[str, ...]:
    """Those that this Pillow was built with: it stops at the first that it lacks."""
    from PIL import Image

    by_suffix = _formats_by_suffix()
    of_name = by_suffix.get(suffix)
    formats = _ANYWHERE if of_name in (None, *_ANYWHERE) else (*_ANYWHERE, of_name)
    return tuple(name for name in formats if name in Image.OPEN)


@functools.cache
def _formats_by_suffix() -> dict[str, str]:
    from PIL import Image

    registered = Image.registered_extensions()
    # Several JPEGs in one file, of which Pillow's decoder of JPEG opens the first.
    registered = {k: "JPEG" if name == "MPO" else name for k, name in registered.items()}
    return {
        suffix: name
        for suffix, name in registered.items()
        if name in Image.OPEN and name not in _NEVER
    }
