"""Hugging Face datasets: of the Hub (--data hf:NAME), or in a folder that `datasets` saved.

Images are taken as the bytes in the table and decoded by our own reader, with its limits.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.training.encoded import EncodedImages
from fastdiff.training.errors import UserError, one_line, printable

PREFIX = "hf:"

# Earlier versions ran the code that came with a dataset.
_OLDEST = 4


def is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    names = ("state.json", "dataset_dict.json")
    return os.path.isdir(path) and any(os.path.isfile(path / name) for name in names)


def load(data: str, split: str) -> tuple[EncodedImages, np.ndarray | None, tuple[str, ...]]:
    """Load what --data names: images, labels int64 (N,) or None, and the classes' names.

    The first column of type `datasets.Image` holds the images, the first of type `ClassLabel` the
    classes.

    Raises
    ------
    UserError
        `datasets` is missing or too old, the dataset or split is not there or cannot be read, or
        has no column of images.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"--data {printable(data)} needs the package datasets; install it with: pip install "
            "datasets"
        ) from error
    if int(re.match(r"\d+", datasets.__version__)[0]) < _OLDEST:
        raise UserError(
            f"--data {printable(data)} needs datasets {_OLDEST} or newer, there is "
            f"{datasets.__version__}; older ones may run code that comes with a dataset"
        )
    name, _, given = data.removeprefix(PREFIX).partition(":")
    data = printable(data)  # from here on for messages
    if not name:
        raise UserError(f"--data {data}: give hf:NAME, such as hf:cifar10, or hf:NAME:SPLIT")
    split = given if given and split == "train" else split
    try:
        saved = is_saved(Path(name))
        table = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise UserError(
                    f"--data {data}: no split {printable(split)}; has {printable(', '.join(table))}"
                )
            table = table[split]
        elif saved and split != "train":
            raise UserError(f"--data {data} has no split {printable(split)}")
        return _columns(datasets, table, data)
    except UserError:
        raise
    except Exception as error:
        # The Hub's client, pyarrow and file systems: not a documented set.
        raise UserError(f"--data {data}: cannot load it: {one_line(error)}") from error


class _Column:
    """The encoded images of a column, by index."""

    def __init__(self, table: Any, name: str) -> None:
        self.table = table
        self.name = name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> bytes | Path:
        image = self.table[int(index)][self.name] or {}  # rows may lack an image
        if image.get("bytes") is None and image.get("path"):
            return Path(image["path"])
        return image.get("bytes") or b""


def _columns(datasets: Any, table: Any, data: str):
    features = table.features
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not pictures:
        raise UserError(
            f"--data {data}: no column of images among {printable(', '.join(features))} (of type "
            "datasets.Image)"
        )
    labels, classes = None, ()
    for name, kind in features.items():
        if isinstance(kind, datasets.ClassLabel):
            labels, classes = np.array(table[name], np.int64), tuple(kind.names)
            if not (labels >= 0).all():
                raise UserError(
                    f"--data {data}: some images have no class in column {printable(name)}"
                )
            break
    images = table.select_columns(pictures[0])
    images = images.cast_column(pictures[0], datasets.Image(decode=False))
    names = [f"image {i}" for i in range(len(table))]
    return EncodedImages(_Column(images, pictures[0]), names, names), labels, classes
