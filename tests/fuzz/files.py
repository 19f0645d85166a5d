"""Files and folders as a disk, a download or somebody hostile leaves them, and what must hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastdiff.training import TrainConfig, UserError, load_dataset
from fastdiff.training.config_file import read_config_file
from fastdiff.training.folders import is_not_data
from fastdiff.training.image_files import image_suffixes

# Every case is of a few kilobytes. Many times what the slowest took beside a full machine.
_SLOW_SECONDS = 60

_MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I")
_ODD = ("\x1b[31m", "\n", "\r", " ", "'", '"', "\\", "%s", "{0}", "-", "~", "\u202e", "\u00e9", "🖼")


def any_file(numbers: random.Random) -> None:
    """One case of any kind."""
    case = numbers.choice((damaged_images, damaged_archives, trees, settings))
    with _folder() as folder:
        start = time.monotonic()
        case(numbers, folder)
        assert time.monotonic() - start < _SLOW_SECONDS, f"{case.__name__} is slow"


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fastdiff-fuzz-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def load(path: object, **options: object) -> tuple[object | None, str]:
    """A dataset or None, and all that was said: for people, on one line each, and no traceback."""
    said: list[str] = []
    dataset = None
    try:
        dataset = load_dataset(str(path), warn=said.append, **options)
    except UserError as error:
        said.append(str(error))
    for line in said:
        assert line.isprintable(), ascii(line)
        assert len(line) < 10_000
        assert "allow_pickle" not in line
    if dataset is not None:
        assert len(dataset) > 0
        pixels = dataset.read(np.arange(len(dataset)))
        assert pixels.dtype == np.uint8
        assert pixels.shape == (len(dataset), *dataset.shape)
        if dataset.labels is not None:
            assert len(dataset.labels) == len(dataset)
            assert 0 <= dataset.labels.min() <= dataset.labels.max() < dataset.num_classes
        json.dumps(dataset.identity)
    return dataset, "\n".join(said)


def damaged(numbers: random.Random, content: bytes) -> bytes:
    """Bits flipped, bytes lost, repeated, zeroed or put elsewhere."""
    data = bytearray(content)
    for _ in range(numbers.choice((1, 1, 1, 2, 5, 20))):
        at = numbers.randrange(len(data) + 1)
        # Most of what is checked is at the start.
        at = min(at, numbers.choice((16, 64, 256, len(data))))
        length = min(numbers.choice((1, 2, 4, 100)), len(data) - at)
        kind = numbers.randrange(6)
        if kind == 0 and length:
            data[at] ^= 1 << numbers.randrange(8)
        elif kind == 1:
            del data[at : None if numbers.random() < 0.3 else at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = bytes(length)
        elif kind == 4:
            data[at : at + length] = b"\xff" * length
        else:
            data[at : at + length] = numbers.randbytes(length)
    return bytes(data)


@functools.cache
def _sources() -> dict[str, bytes]:
    """A file in every format that Pillow writes, by its ending, in several modes."""
    Image.init()
    found = {}
    picture = Image.radial_gradient("L").resize((24, 16))
    for suffix, name in Image.registered_extensions().items():
        if name not in Image.SAVE:
            continue
        for mode in _MODES:
            buffer = io.BytesIO()
            frames = [picture.convert("L").rotate(90 * k).convert(mode) for k in range(2)]
            for options in ({"save_all": True, "append_images": frames[1:]}, {}):
                with contextlib.suppress(Exception):  # formats lack modes, and frames
                    frames[0].save(buffer, name, **options)
                    found[f"{mode.replace(';', '')}-{len(options)}{suffix}"] = buffer.getvalue()
                    break
    return found


def damaged_images(numbers: random.Random, folder: Path) -> None:
    """Whole images are there whatever lies beside them, and each of the others is counted."""
    sources = _sources()
    whole = np.full((16, 24), 77, np.uint8)
    Image.fromarray(whole).save(folder / "0.png")
    readable = 1
    for k in range(1, numbers.randrange(2, 6)):
        name, content = numbers.choice(sorted(sources.items()))
        suffix = Path(name).suffix if numbers.random() < 0.8 else numbers.choice((".png", ".tga"))
        readable += suffix in image_suffixes()
        (folder / f"{k}{suffix}").write_bytes(damaged(numbers, content))
    dataset, said = load(folder, image_size=16, channels=1)
    if dataset is None:
        assert "may be a decompression bomb" in said
        return
    skipped = sum(map(int, re.findall(r"skipped (\d+) of", said)))
    assert len(dataset) + skipped == readable
    assert (dataset.images[0] == 77).all()


def damaged_archives(numbers: random.Random, folder: Path) -> None:
    """An .npz is read as NumPy reads it, or refused."""
    shape = tuple(numbers.randrange(5) for _ in range(numbers.randrange(6)))
    if numbers.random() < 0.5:
        shape = (numbers.randrange(1, 5), 4, 4, 3)[: numbers.choice((3, 4))]
    dtype = numbers.choice(("u1", "u1", "u1", "i8", "f4", "f8", "?", "O", "U2", "V3", "c16", "M8"))
    generator = np.random.default_rng(numbers.randrange(2**32))
    if dtype in ("U2", "V3", "M8", "c16", "O"):
        images = np.zeros(shape, dtype)
    else:
        images = np.array(generator.integers(0, 2, shape)).astype(dtype)
        if dtype in ("f4", "f8") and images.size and numbers.random() < 0.5:
            images = np.where(images > 0, np.nan, images)
    arrays = {numbers.choice(("images", "arr_0", "x", "\x1b[31m")): images}
    if numbers.random() < 0.5:
        labels = generator.integers(-1, 5, numbers.choice((len(images) if shape else 1, 2, (2, 2))))
        arrays["labels"] = labels.astype(numbers.choice(("i8", "u1", "f4", "O", "?")))
    path = folder / "images.npz"
    (np.savez if numbers.random() < 0.5 else np.savez_compressed)(path, **arrays)
    if numbers.random() < 0.7:
        path.write_bytes(damaged(numbers, path.read_bytes()))
        load(path)
        return
    dataset, said = load(path)
    if dataset is not None:
        given = images[..., None] if images.ndim == 3 else images
        assert images.dtype == np.uint8
        assert np.array_equal(dataset.images, given)
    else:
        assert str(path) in said


def trees(numbers: random.Random, folder: Path) -> None:
    """Every image is found once, whatever its folders are called and wherever links lead."""
    root = folder / "root"
    folders, names = [root, folder / "outside"], ["a", "b", "train", ".hid", "__MACOSX", "@eaDir"]
    for made in folders:
        made.mkdir()
    Image.new("L", (8, 8)).save(folder / "outside/0.png")
    for k in range(numbers.randrange(25)):
        parent = numbers.choice(folders)
        name = numbers.choice((*names, f"{numbers.choice(_ODD)}{k}", os.fsdecode(b"\xff%d" % k)))
        path = parent / (name[:200] if numbers.random() < 0.9 else name + "x" * (240 - len(name)))
        if path.exists() or path.is_symlink():
            continue
        kind = numbers.randrange(8)
        if kind < 3:
            path.mkdir()
            folders.append(path)
        elif kind in (3, 4):
            target = numbers.choice((*folders, folder / "nowhere", Path("loop"), path))
            relative = numbers.random() < 0.5 and target.is_absolute()
            path.symlink_to(os.path.relpath(target, parent) if relative else target)
        elif kind == 5 and numbers.random() < 0.3:
            os.mkfifo(parent / f"pipe{k}.png")
        else:
            suffix = numbers.choice((".png", ".PNG", ".bmp", ".txt", "", ".heic"))
            target = path.with_name(path.name + suffix)
            if target.exists() or target.is_symlink():
                continue
            if suffix.lower() in image_suffixes():
                Image.new("L", (8, 8), k).save(target, suffix[1:].upper())
            else:
                target.write_bytes(b"\x1b[31m")
    expected = _images_below(root)
    dataset, said = load(root, image_size=8)
    if not expected:
        assert dataset is None
        assert "no images found" in said or "can be read" in said
        return
    skipped = sum(map(int, re.findall(r"skipped (\d+) of", said)))
    unreadable = sum(1 for path in expected if not os.path.isfile(path))
    if dataset is None:
        assert unreadable == len(expected)
        return
    assert skipped == unreadable
    assert len(dataset) == len(expected) - unreadable
    # The same images elsewhere, and by another way.
    shutil.move(root, folder / "moved")
    if not any(path.is_symlink() for path in (folder / "moved").rglob("*")):
        (folder / "way").symlink_to("moved")
        again, _ = load(folder / "way", image_size=8)
        assert again.identity == dataset.identity
        assert np.array_equal(again.images, dataset.images)


def _images_below(root: Path) -> list[Path]:
    """Image files by name, in all folders that can be reached, each real one once."""
    above = set(Path(os.path.realpath(root)).parents)
    reached, pending, found = set(), [root], []
    while pending:
        current = Path(os.path.realpath(pending.pop()))
        if current in reached or current in above:
            continue
        reached.add(current)
        for name in os.listdir(current):
            if is_not_data(name):
                continue
            if os.path.isdir(current / name):
                pending.append(current / name)
            elif Path(name).suffix.lower() in image_suffixes():
                found.append(current / name)
    return found


_VALUES = ("1", "0.5", "-1", "1e400", "nan", ".inf", "null", "true", "off", "[1, 2]", "{a: 1}")
_VALUES += ('"x"', "9" * 5000, "2026-99-99", "&a [*a]", "!!python/name:os.system", "\x00", "\x1b")


def settings(numbers: random.Random, folder: Path) -> None:
    """A file of settings gives settings that a run can have, or an error that names it."""
    names = [*TrainConfig.__dataclass_fields__, "no-such", "\x1b[31m", "lr\n"]
    suffix = numbers.choice((".yaml", ".toml", ".json", ".YML", ""))
    rows = [(numbers.choice(names), numbers.choice(_VALUES)) for _ in range(numbers.randrange(6))]
    if suffix == ".json":
        text = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in rows) + "}"
    else:
        text = "".join(f"{n}{' = ' if suffix == '.toml' else ': '}{v}\n" for n, v in rows)
    content = text.encode(numbers.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be")))
    if numbers.random() < 0.3 and content:
        content = damaged(numbers, content)
    path = folder / f"settings{suffix}"
    path.write_bytes(content)
    where = f"--config {path}"
    try:
        config = TrainConfig().updated(read_config_file(path), where)
        config.validate()
    except UserError as error:
        line = " ".join(str(error).split())
        assert line.startswith("--")
        assert len(line) < 10_000
        assert "\x1b" not in line
        return
    written = dataclasses.replace(config, resume=False)  # which is said anew each time
    assert TrainConfig().updated(json.loads(config.to_json()), where) == written
