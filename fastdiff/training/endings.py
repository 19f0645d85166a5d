"""How a run ends early: in one line that names the step, and what is left of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from fastdiff.training.errors import RunError, UserError, is_out_of_memory, one_line
from fastdiff.training.state import TrainState


@contextmanager
def telling(run: TrainState) -> Iterator[None]:
    """Let every error, and Ctrl-C, say which checkpoint is intact."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{error}; {what_is_left(run)}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"step {run.step}: out of memory ({one_line(error)[:300]})"
        raise RunError(f"{what}; {what_is_left(run)}") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(what_is_left(run)) from error


@contextmanager
def writing(run: TrainState) -> Iterator[None]:
    """Turn an error of the disk (full, read-only) into one that says at which step."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        where, reason = error.filename or run.folder.path, error.strerror or error
        raise RunError(f"step {run.step}: cannot write {where}: {reason}") from error
    except SafetensorError as error:
        raise RunError(f"step {run.step}: cannot write the model: {error}") from error


def next_batch(batches: Iterator, step: int) -> tuple[Tensor, Tensor | None]:
    """The next batch; that its images have gone is no fault of what was trained so far."""
    try:
        return next(batches)
    except UserError as error:
        raise RunError(f"step {step}: {error}") from error
    except OSError as error:
        raise RunError(f"step {step}: cannot read the images: {error}") from error


def what_is_left(run: TrainState) -> str:
    """The checkpoint to go on from, and how."""
    if run.saved is None:
        return "no checkpoint had been written yet"
    return (
        f"the checkpoint of step {run.saved} is intact, continue from it with "
        f"--out {shlex.quote(str(run.folder.path))} --resume"
    )
