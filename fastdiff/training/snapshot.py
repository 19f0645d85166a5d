"""The whole state of a run: taken for a checkpoint, put back from one; and the model for others."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import torch
from torch import Tensor

from fastdiff.nn.config import UNetConfig
from fastdiff.training import identity, shards
from fastdiff.training.checkpoint import Checkpoint
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Dataset
from fastdiff.training.errors import UserError, naming, one_line, printable
from fastdiff.training.files import TEMPORARY, sync_tree
from fastdiff.training.state import TrainState


def take(run: TrainState) -> Checkpoint:
    """Return everything that `restore` needs; all processes must call it."""
    return Checkpoint(
        step=run.step,
        meta=_facts_of_model(run) | _facts_of_data(run.dataset),
        model=shards.gather(run.unet.state_dict()),
        emas=[shards.gather(ema.model.state_dict()) for ema in run.emas],
        state={
            "optimizer": shards.gather_optimizer(run.optimizer, list(run.unet.parameters())),
            "ema_updates": run.emas[0].num_updates,
            "samples_seen": run.step * run.config.batch_size,
            "loss_scaler": run.scaler.state_dict(),
            "timesteps": run.timesteps.state_dict(),
            "meter": run.meter.state(run.world),
            "metrics": None if run.metrics is None else run.metrics.digest(),
        },
    )


def check_data(checkpoint: Checkpoint, dataset: Dataset, data: str) -> None:
    """Raise `UserError` unless ``dataset`` is what the run was trained on, wherever it lies.

    ``data`` is the value of --data.
    """
    here = json.loads(json.dumps(_facts_of_data(dataset)))
    there = {name: checkpoint.meta.get(name) for name in here}
    with naming(f"--resume: checkpoint of step {checkpoint.step}"):
        changed = identity.differences(there, here)
    if changed:
        raise UserError(
            f"--resume: --data {printable(data)} does not hold what the run was trained on until "
            f"step {checkpoint.step}: {'; '.join(changed)}; give the same images with --data, "
            "wherever they are now, or train anew with another --out"
        )


def restore(run: TrainState, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state back.

    The number of processes may be another than that of the run that wrote it.

    Raises
    ------
    UserError
        The checkpoint is of other settings, another model or other data.
    """
    check_data(checkpoint, run.dataset, run.config.data)
    # As JSON would give them back, tuples as lists.
    here = json.loads(json.dumps(_facts_of_model(run)))
    there = {name: checkpoint.meta.get(name) for name in here}
    with naming(f"--resume: checkpoint of step {checkpoint.step}"):
        there |= _as_written_today(there)
    if there != here:
        raise UserError(
            f"--resume: the checkpoint in {run.folder.path} is of another run: "
            f"{'; '.join(_differences(there, here))}; train anew with another --out"
        )
    try:
        _put_back(run, checkpoint)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        # Its checksums are right, so that somebody made it so.
        raise UserError(
            f"--resume: the checkpoint of step {checkpoint.step} in {run.folder.path} does not "
            f"hold the state of such a run: {one_line(error)[:300]}"
        ) from error


def _put_back(run: TrainState, checkpoint: Checkpoint) -> None:
    """Load everything, after a look at the shapes of what nobody else compares."""
    state, parameters = checkpoint.state, list(run.unet.parameters())
    _check_shapes("model", checkpoint.model, run.unet.state_dict())
    for average in checkpoint.emas:
        _check_shapes("average", average, run.unet.state_dict())
    _check_optimizer(state["optimizer"], parameters)
    seen = checkpoint.step * run.config.batch_size
    if state["samples_seen"] != seen:
        raise ValueError(f"{state['samples_seen']} images were seen, expected {seen}")
    run.step = checkpoint.step
    shards.load(run.unet, checkpoint.model)
    for ema, average in zip(run.emas, checkpoint.emas, strict=True):
        shards.load(ema.model, average)
        ema.num_updates = int(state["ema_updates"])
    # What is in its groups are settings, which are compared already.
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict(
        shards.scatter_optimizer({**state["optimizer"], "param_groups": groups}, parameters)
    )
    run.scaler.load_state_dict(state["loss_scaler"])
    run.timesteps.load_state_dict(state["timesteps"])
    if "meter" in state:  # older versions had none
        run.meter.restore(state["meter"], run.world.rank)
    run.known_metrics = state.get("metrics")


def _check_shapes(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in found.keys() ^ expected.keys():
        raise ValueError(f"the {what} lacks {name}, or has too much of it")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"the {what} has {name} of shape {tuple(tensor.shape)} and {tensor.dtype}, "
                f"expected {tuple(expected[name].shape)} and {expected[name].dtype}"
            )


def _check_optimizer(state: dict[str, Any], parameters: list[Tensor]) -> None:
    """Its fused kernels trust that what belongs to a parameter has its shape."""
    for index, entry in state["state"].items():
        for name, value in entry.items():
            shape = () if name == "step" else parameters[index].shape
            if tuple(value.shape) != tuple(shape) or value.dtype != torch.float32:
                raise ValueError(
                    f"the optimizer has {name} of shape {tuple(value.shape)} and {value.dtype} for "
                    f"a parameter of {tuple(parameters[index].shape)}"
                )


def save_model(run: TrainState) -> None:
    """Write model/, the averaged weights in diffusers' format, where that can express them.

    All processes must call it; rank 0 writes.
    """
    from tqdm import tqdm

    from fastdiff.nn import diffusers_format

    config, folder = run.config, run.folder
    averaged = run.averaged()
    if not run.world.is_first:
        return
    try:
        scheduler = diffusers_format.ddpm_scheduler_config(
            run.diffusion.schedule.betas, config.prediction, config.variance
        )
        # Beside the old one first, so that there is a whole model/ at any moment but one.
        fresh, old = folder.path / f"{TEMPORARY}model", folder.path / f"{TEMPORARY}old-model"
        diffusers_format.save_pretrained(averaged, fresh, scheduler)
        sync_tree(fresh)
    except diffusers_format.UnsupportedByDiffusersError as error:
        # Above the progress bar.
        tqdm.write(f"model/ in diffusers' format was not written: {error}", file=sys.stderr)
        return
    if folder.model.exists():
        folder.model.rename(old)
    fresh.rename(folder.model)
    shutil.rmtree(old, ignore_errors=True)


def _facts_of_model(run: TrainState) -> dict[str, Any]:
    """What a checkpoint says about the run, and must find when it is restored."""
    return {"settings": run.config.identity(), "unet": run.unet.config.to_dict()}


def _facts_of_data(dataset: Dataset) -> dict[str, Any]:
    """The same about its data: what they are, not where."""
    height, width, channels = dataset.shape
    return {
        "image_shape": [channels, height, width],
        "num_images": len(dataset),
        "classes": list(dataset.classes),
        "data": dataset.identity,
    }


def _as_written_today(meta: dict[str, Any]) -> dict[str, Any]:
    """Settings and U-Net of an older version, completed by what it did without a name for it."""
    settings = TrainConfig().updated(meta["settings"], "settings").identity()
    unet = UNetConfig.from_dict(meta["unet"]).to_dict()
    return json.loads(json.dumps({"settings": settings, "unet": unet}))


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Describe the fields in which two nested dicts differ, and nothing else of them."""
    lines = []
    for name in here | there:
        theirs, ours = there.get(name), here.get(name)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            lines += [f"{name}.{line}" for line in _differences(theirs, ours)]
        elif isinstance(theirs, dict) or isinstance(ours, dict):
            lines.append(f"it has no {name}" if theirs is None else f"its {name} differs")
        elif theirs != ours:
            lines.append(f"{name} is {theirs}, not {ours}")
    return lines
