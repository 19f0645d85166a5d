"""Image files as uint8 arrays, of any mode, upright and opaque; and why one cannot be used."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np

from fastdiff.training.errors import UserError, one_line

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

# A file's content decides on its decoder, whatever its name. Only these, because others of Pillow's
# are hardly tested, and that of EPS starts Ghostscript on the file.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_GREY_MODES = frozenset(("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"))
_EXIF_ORIENTATION = 0x0112


class UnusableImage(ValueError):
    """Why an image cannot be used: cut off, damaged, or of pixels without a known range."""


def read_header(source: Path | bytes, name: str) -> tuple[tuple[int, int], bool]:
    """Return an image's size (width, height) when it is upright, and whether it is grey.

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
        # To look for EXIF behind the pixels, where it hardly ever is, Pillow decodes a whole PNG.
        has_exif = image.format != "PNG" or "exif" in image.info
        on_its_side = has_exif and image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
        return image.size[::-1] if on_its_side else image.size, image.mode in _GREY_MODES

    return _with_image(source, name, header)


def decode(source: Path | bytes, name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image to uint8 of ``shape`` (H, W, C), C = 1 or 3.

    Upright as its EXIF says; what is transparent in it on white; 16 bits rounded to 8; resized to
    cover the shape and cropped at the centre if it is of another size. Parameters and errors as
    those of `read_header`.
    """
    height, width, channels = shape

    def pixels(image):
        from PIL import Image, ImageOps

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
    # Mode I has 32 bits, but what opens as I, such as PGM, holds 16.
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UnusableImage(f"pixels of {values.min()}..{values.max()}: more than 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _with_image(source, name, work):
    """Return ``work(image)``, with every error that Pillow can raise turned into one of ours."""
    from PIL import Image, UnidentifiedImageError

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_known_formats()) as image:
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
        unidentified = isinstance(error, UnidentifiedImageError)
        reason = "not an image in a known format" if unidentified else one_line(error)
        raise UnusableImage(reason or type(error).__name__) from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those that this Pillow was built with: it stops at the first that it lacks."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
