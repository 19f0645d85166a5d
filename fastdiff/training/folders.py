"""Folders of images: which files are images, of which class, and what is left out and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastdiff.training.encoded import EncodedImages
from fastdiff.training.errors import UserError, printable
from fastdiff.training.image_files import image_suffixes

# Names of one kind up to this many, the others counted.
_NAMED = 5
_LONGEST_SUFFIX = 20

# What systems and tools put beside data (hidden names apart): previews, unpacked metadata, bins.
_NOT_DATA = frozenset(
    ("__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found")
) | {"system volume information", "thumbs.db", "desktop.ini"}

# Names of parts of a dataset, which are hardly ever classes.
_SPLITS = frozenset(
    ("train", "training", "trainset", "test", "testing", "testset", "val", "valid", "validation")
) | {"valset", "dev", "eval"}


@dataclass
class _Contents:
    """What a walk through a folder finds."""

    images: list[Path] = field(default_factory=list)
    suffixes: Counter[str] = field(default_factory=Counter)
    """Of files that are no images."""
    examples: dict[str, str] = field(default_factory=dict)
    """A file of each."""
    subfolders: list[str] = field(default_factory=list)
    """Of the folder itself, that were read."""
    hidden: list[str] = field(default_factory=list)
    """Folders that hold no data by their name, and hidden images."""
    runs: list[str] = field(default_factory=list)
    """Run folders, whose images are samples."""
    links: list[str] = field(default_factory=list)
    """Links to folders that are read already, or that lead back up."""
    broken: list[str] = field(default_factory=list)
    """Links to nothing; those with the name of an image are counted among unreadable images."""


def find(
    folder: Path, warn: Callable[[str], None]
) -> tuple[EncodedImages, np.ndarray | None, tuple[str, ...]]:
    """Return the images below a folder, their labels int64 (N,) or None, and the classes' names.

    A class is a subfolder, or a link to one. Images in the folder itself have none, and then no
    image has. Everything that is left out, and whatever looks as if it was not meant, is said.

    Raises
    ------
    UserError
        There is no image, or a folder cannot be read.
    """
    found = _walk(folder)
    left_out = _left_out(found)
    if not found.images:
        raise UserError(
            f"--data {printable(folder)}: no images found in the folder"
            + (f" (left out: {left_out})" if left_out else "")
            + f"; files ending in {', '.join(sorted(image_suffixes()))} are read"
        )
    if left_out:
        warn(f"--data {printable(folder)}: left out: {left_out}")
    keys = [path.relative_to(folder).as_posix() for path in found.images]
    images = EncodedImages(found.images, [printable(p) for p in found.images], keys)
    tops = [key.partition("/")[0] if "/" in key else "" for key in keys]
    names = sorted(set(tops))
    if names == [""]:
        return images, None, ()
    if names[0] == "":
        warn(
            f"--data {printable(folder)}: {tops.count('')} of {len(tops)} images lie in the folder "
            f"itself, beside {_listed(names[1:])}, so that no image has a class; move them into a "
            "subfolder if the subfolders are classes"
        )
        return images, None, ()
    if empty := [name for name in found.subfolders if name not in set(names)]:
        warn(f"--data {printable(folder)}: no image in the subfolders {_listed(empty)}")
    _warn_of_splits(folder, names, keys, warn)
    number = {name: i for i, name in enumerate(names)}
    return images, np.array([number[top] for top in tops], np.int64), tuple(names)


def is_not_data(name: str) -> bool:
    """Whether a file or folder below the one that is read is passed over: hidden, or a system's."""
    return name.startswith(".") or name.lower() in _NOT_DATA


def without_empty_classes(
    data: str, labels: np.ndarray, classes: tuple[str, ...], warn: Callable[[str], None]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Leave out, and name, the classes that no image is of."""
    present = np.unique(labels)
    if len(present) == len(classes):
        return labels, classes
    empty = [name for i, name in enumerate(classes) if i not in set(present.tolist())]
    warn(
        f"--data {printable(data)}: no usable image in {_listed(empty)}, which "
        f"{'is no class' if len(empty) == 1 else 'are no classes'} then"
    )
    return np.searchsorted(present, labels), tuple(classes[i] for i in present)


def _walk(folder: Path) -> _Contents:
    """Every folder below is read once, real ones before links to them."""
    found = _Contents()
    real = os.path.realpath(folder)
    above, seen = set(map(str, Path(real).parents)), {real}
    # Each with where it really lies. Not by the number of its inode, which some disks do not have.
    folders, links = [(folder, real)], []
    while folders or links:
        if folders:
            current, real = folders.pop()
        else:
            current = links.pop(0)
            real = os.path.realpath(current)
            if real in seen or real in above:
                found.links.append(_shown(current, folder))
                continue
            seen.add(real)
            if current.parent == folder:
                found.subfolders.append(current.name)
        for entry in _entries(folder, current):
            path, place = current / entry.name, os.path.join(real, entry.name)
            if not _is_folder(entry):
                _take_file(path, folder, found)
            elif is_not_data(entry.name):
                found.hidden.append(_shown(path, folder))
            elif _is_run(path):
                found.runs.append(_shown(path, folder))
            elif entry.is_symlink():
                links.append(path)
            elif place in seen:  # below a link's target
                found.links.append(_shown(path, folder))
            else:
                seen.add(place)
                folders.append((path, place))
                if current == folder:
                    found.subfolders.append(entry.name)
    found.images.sort()
    return found


def _take_file(path: Path, folder: Path, found: _Contents) -> None:
    suffix = path.suffix.lower()
    ignored = is_not_data(path.name)
    if suffix in image_suffixes():
        # Hidden ones are what macOS keeps about a picture, or somebody's cache.
        if ignored:
            found.hidden.append(_shown(path, folder))
        else:
            found.images.append(path)
    elif path.is_symlink() and not os.path.exists(path):
        found.broken.append(_shown(path, folder))
    elif not ignored:
        found.suffixes[suffix] += 1
        found.examples.setdefault(suffix, _shown(path, folder))


def _entries(folder: Path, current: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(current) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"--data {printable(folder)}: cannot read {printable(current)}: {error.strerror}"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for one; as an image it is counted among the unreadable
        return False


def _is_run(path: Path) -> bool:
    return os.path.isfile(path / "config.json") and os.path.isdir(path / "checkpoints")


def _left_out(found: _Contents) -> str:
    parts = []
    if found.suffixes:
        kinds = [
            f"{count} {_suffix_shown(suffix)} (such as {found.examples[suffix]})"
            for suffix, count in found.suffixes.most_common(_NAMED)
        ]
        more = found.suffixes.total() - sum(n for _, n in found.suffixes.most_common(_NAMED))
        kinds += [f"{more} of other kinds"] if more else []
        parts.append(f"files that are no known images: {', '.join(kinds)}")
    for reason, names in (
        ("hidden, or kept by the system", found.hidden),
        ("run folders", found.runs),
        ("links to folders that are read already, or above", found.links),
        ("links to nothing", found.broken),
    ):
        if names:
            parts.append(f"{reason}: {_listed(names, escaped=True)}")
    return "; ".join(parts)


def _suffix_shown(suffix: str) -> str:
    shown = printable(suffix) or "without an ending"
    return shown if len(shown) <= _LONGEST_SUFFIX else f"{shown[:_LONGEST_SUFFIX]}..."


def _warn_of_splits(
    folder: Path, names: Sequence[str], keys: Iterable[str], warn: Callable[[str], None]
) -> None:
    """Say so if the subfolders look like parts of a dataset, or like a wrapping, not classes."""
    splits = [name for name in names if name.lower() in _SPLITS]
    if len(splits) > 1 or len(splits) == len(names):
        # The one to train on, if it is there.
        one = min(splits, key=lambda name: not name.lower().startswith("train"))
        warn(
            f"--data {printable(folder)}: {_listed(splits)} "
            f"{'are taken for classes' if len(splits) > 1 else 'is taken for a class'}; if parts "
            f"of a dataset are meant, give one of them: --data {printable(folder / one)}"
        )
    elif len(names) == 1:
        below = {key.split("/")[1] for key in keys if key.count("/") > 1}
        if len(below) > 1:
            warn(
                f"--data {printable(folder)}: one class only, {printable(names[0])}; if its "
                f"subfolders {_listed(sorted(below))} are the classes, give --data "
                f"{printable(folder / names[0])}"
            )


def _shown(path: Path, folder: Path) -> str:
    return printable(path.relative_to(folder))


def _listed(names: Sequence[str], escaped: bool = False) -> str:
    shown = [name if escaped else printable(name) for name in names[:_NAMED]]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(shown) + more
