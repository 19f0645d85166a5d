"""Checkpoints that survive kills and full disks.

A checkpoint is a folder ``checkpoints/step-00001000`` with

- ``model.safetensors``, ``ema.safetensors``, ``ema-2.safetensors`` ...: the weights and their
  averages, in the order of ``--ema``,
- ``state.pt``: optimizer and counters, loadable with ``weights_only=True``,
- ``checkpoint.json``: step, what is needed to build the model, SHA-256 of the other files and, as
  ``checksum``, of what it says itself (older versions wrote none, and are still read).

It is written under a temporary name, synced to disk and then renamed, so a folder with the final
name is complete; older checkpoints are deleted only after that.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.training.files import (
    TEMPORARY,
    read_file,
    remove_leftovers,
    sync_folder,
    write_synced,
)

_NAME = re.compile(r"step-([0-9]{8,})")
_MANIFEST = "checkpoint.json"
_AVERAGE = re.compile(r"ema(-\d+)?\.safetensors")

# From 2 on, checkpoint.json has a checksum.
_FORMAT = 2
_LARGEST_MANIFEST = 1 << 28
_OWN = ("checksum", "format", "sha256", "step")


class DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete or whose content does not match its checksums."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: weights, averaged weights, and everything else.

    Attributes
    ----------
    step : int
        Optimizer steps done.
    meta : dict
        JSON-able facts that describe the model, so that it can be built from the checkpoint alone.
    model : dict of str to Tensor
        State dict.
    emas : list of dict of str to Tensor
        State dicts of its averages.
    state : dict
        Optimizer and counters: tensors, numbers, strings, lists and dicts.
    """

    step: int
    meta: dict[str, Any]
    model: dict[str, Tensor]
    emas: list[dict[str, Tensor]]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``checkpoint`` into ``folder``, then delete all but it and the ``keep - 1`` before it.

    Checkpoints of later steps go too: those that the run went back from.

    Raises
    ------
    OSError
        When it cannot be written (a full disk); nothing that was there is touched.
    """
    import safetensors.torch

    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    name = _folder_name(checkpoint.step)
    temporary, final = folder / (TEMPORARY + name), folder / name
    buffer = io.BytesIO()
    torch.save(checkpoint.state, buffer)
    # Serialized in memory and written by us: safetensors' own writer hides the errno of a full
    # disk, and the checksum is then of what was meant to be written.
    contents = {
        "model.safetensors": safetensors.torch.save(_contiguous(checkpoint.model)),
        **{
            _average(index): safetensors.torch.save(_contiguous(average))
            for index, average in enumerate(checkpoint.emas)
        },
        "state.pt": buffer.getbuffer(),
    }
    manifest = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        **checkpoint.meta,
    }
    manifest["checksum"] = checksum(json.loads(json.dumps(manifest)))
    contents[_MANIFEST] = json.dumps(manifest, indent=2).encode()
    try:
        temporary.mkdir()
        for name, data in contents.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        if final.exists():
            # Left by a run that went on from an older checkpoint because this one was damaged.
            final.rename(folder / f"{TEMPORARY}old-{final.name}")
        temporary.rename(final)
        sync_folder(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(folder, checkpoint.step, keep)
    return final


def prune(folder: Path, step: int, keep: int) -> None:
    """Delete all checkpoints but that of ``step`` and the ``keep - 1`` before it, and leftovers."""
    # Later steps are what the run left behind when it went back here: damaged, or of a future it
    # no longer has. They must not count as the newest.
    listed = _listed(folder)
    abandoned = [path for found, path in listed if found > step]
    reached = [path for found, path in listed if found <= step]
    for old in abandoned + reached[max(1, keep) :]:
        old.rename(folder / (TEMPORARY + old.name))
    remove_leftovers(folder)


def checksum(values: dict[str, Any]) -> str:
    """SHA-256 of what a JSON object says, but for its own ``checksum``; spaces do not count."""
    rest = {name: value for name, value in values.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Checkpoint:
    """Read the checkpoint in the folder ``path``.

    Raises
    ------
    DamagedCheckpoint
        When a file is missing, unreadable, or does not match its checksum.
    """
    import safetensors.torch

    try:
        manifest = json.loads(read_file(path / _MANIFEST, _LARGEST_MANIFEST))
        _check_manifest(manifest, path)
        # No other name than these is opened, whatever the manifest says.
        averages = [_average(i) for i in range(sum(map(_is_average, manifest["sha256"])))]
        names = ("model.safetensors", *averages, "state.pt")
        contents = {name: read_file(path / name) for name in names}
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]:
                raise DamagedCheckpoint(f"{path / name} does not match its checksum")
        return Checkpoint(
            step=manifest["step"],
            model=safetensors.torch.load(contents["model.safetensors"]),
            emas=[safetensors.torch.load(contents[name]) for name in averages],
            state=torch.load(
                io.BytesIO(contents["state.pt"]), map_location="cpu", weights_only=True
            ),
            meta={key: value for key, value in manifest.items() if key not in _OWN},
        )
    except (DamagedCheckpoint, MemoryError):
        raise
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename or path}: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        # torch's message advises to load it all the same.
        raise DamagedCheckpoint(
            f"refused to load {path / 'state.pt'}: it is not made of tensors, numbers and strings "
            "alone, and loading anything else could run code"
        ) from error
    except Exception as error:
        # What a parser raises on bytes it did not expect is not a documented set.
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Compare checkpoint.json with itself and with its folder's name."""
    if "checksum" in manifest or "format" in manifest:
        if manifest.get("checksum") != checksum(manifest):
            raise DamagedCheckpoint(f"{path / _MANIFEST} does not match its checksum")
        if manifest["format"] != _FORMAT:
            raise DamagedCheckpoint(
                f"{path / _MANIFEST} is of format {manifest['format']}, not {_FORMAT}"
            )
    step = manifest["step"]
    if type(step) is not int or step < 0:
        raise DamagedCheckpoint(f"{path / _MANIFEST} has no step")
    if _NAME.fullmatch(path.name) and path.name != _folder_name(step):
        raise DamagedCheckpoint(f"{path / _MANIFEST} is of step {step}, unlike its folder's name")


def load_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest good checkpoint in ``folder``; None if there is none at all.

    Damaged ones are passed over, with a message to ``warn`` for each. One that the run itself
    deletes meanwhile is not damaged: there is a newer one by then.

    Raises
    ------
    DamagedCheckpoint
        When there are checkpoints and every one is damaged.
    """
    told: set[Path] = set()
    while listed := _listed(folder):
        for _, path in listed:
            try:
                return load(path)
            except DamagedCheckpoint as error:
                if not path.exists() and _listed(folder) != listed:
                    break
                if path not in told:
                    warn(f"skipping the damaged checkpoint {path.name}: {error}")
                told.add(path)
        else:
            raise DamagedCheckpoint(f"every checkpoint in {folder} is damaged")
    return None


def _average(index: int) -> str:
    """Name of the file of an average: the first is what older versions wrote."""
    return f"ema-{index + 1}.safetensors" if index else "ema.safetensors"


def _is_average(name: str) -> bool:
    return _AVERAGE.fullmatch(name) is not None


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _listed(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in ``folder`` as (step, path), newest first."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses channels_last weights; the format is put back when they are loaded.
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
