"""Fetching the built-in datasets, only when asked (--download), through torchvision."""

from __future__ import annotations

from fastdiff.training.data import USUAL_PLACES, has_files
from fastdiff.training.errors import UserError, one_line

# torchvision's names; it checks what it fetched.
_CLASSES = {"cifar10": "CIFAR10", "fashion-mnist": "FashionMNIST"}


def download(data: str, data_dir: str | None = None) -> None:
    """Fetch a dataset's files into ``data_dir`` (default: data/), if they are not there already.

    Raises
    ------
    UserError
        The dataset is none that can be fetched, torchvision is missing, or it failed.
    """
    if data not in _CLASSES:
        raise UserError(f"--download fetches {' and '.join(_CLASSES)} only, not --data {data}")
    if has_files(data, data_dir):
        return
    try:
        import torchvision
    except ModuleNotFoundError as error:
        raise UserError(
            f"--download needs torchvision; install it with: pip install torchvision, or put the "
            f"files of {data} into a folder and give it with --data-dir"
        ) from error
    root = data_dir or USUAL_PLACES[0]
    try:
        getattr(torchvision.datasets, _CLASSES[data])(root, download=True)
    except Exception as error:
        # Network, disk, damaged archive: what torchvision raises is not a documented set.
        raise UserError(
            f"--download: cannot fetch {data} into {root}: {one_line(error)}"
        ) from error
