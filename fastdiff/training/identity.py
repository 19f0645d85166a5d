"""What makes data the same data wherever they are: by content, never by the path as typed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastdiff.training.errors import printable

_CHUNK = 4096
_NAMED = 5


def of_files(names: Iterable[str], sizes: Iterable[int], labels: np.ndarray | None) -> dict:
    """Identity of image files: their names below the folder, and sizes in bytes, in order."""
    sizes = list(sizes)
    return {
        "names": _digest(os.fsencode(name) + b"\0" for name in names),
        "sizes": _digest(b"%d\0" % size for size in sizes),
        "bytes": sum(sizes),
        "labels": _of_labels(labels),
    }


def of_arrays(images: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Identity of images (N, H, W, C) held in memory."""
    parts = (images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK))
    return {
        "pixels": _digest(np.ascontiguousarray(part).data for part in parts),
        "labels": _of_labels(labels),
    }


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Describe how the data of a checkpoint (``there``) differ from those given now.

    Both have ``image_shape``, ``num_images``, ``classes`` and, but for checkpoints of older
    versions, ``data``: the identity.
    """
    found = []
    if there["image_shape"] != here["image_shape"]:
        before, now = (_shape(facts["image_shape"]) for facts in (there, here))
        found.append(f"images of {before}, now {now}")
    if there["num_images"] != here["num_images"]:
        found.append(f"{there['num_images']} images, now {here['num_images']}")
    if there["classes"] != here["classes"]:
        found.append(_of_classes(list(there["classes"] or ()), list(here["classes"])))
    before, now = there["data"], here["data"]
    if not isinstance(before, dict) or before == now:
        return found
    if before.keys() != now.keys():
        found.append("image files in place of arrays, or arrays in place of image files")
    if before.get("names") != now.get("names"):
        found.append("files of other names")
    elif before.get("sizes") != now.get("sizes"):
        sizes = f"{before.get('bytes')} bytes, now {now.get('bytes')}"
        found.append(f"files of the same names and other sizes ({sizes})")
    if before.get("pixels") != now.get("pixels"):
        found.append("other pixels")
    if before.get("labels") != now.get("labels") and there["classes"] == here["classes"]:
        found.append("other labels of the images")
    return found


def _of_classes(before: list[str], now: list[str]) -> str:
    gone = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    parts = []
    for what, names in (("without the class", gone), ("with the new class", new)):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            plural = "es" if len(names) > 1 else ""
            parts.append(f"{what}{plural} {', '.join(map(printable, names[:_NAMED]))}{more}")
    return " and ".join(parts) or "classes in another order"


def _shape(shape: Any) -> str:
    try:
        channels, height, width = shape
    except (TypeError, ValueError):  # whatever somebody wrote into the checkpoint
        return repr(shape)
    return f"{height}x{width}x{channels}"


def _of_labels(labels: np.ndarray | None) -> str | None:
    return None if labels is None else _digest([np.asarray(labels, "<i8").tobytes()])


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(part)
    return total.hexdigest()
