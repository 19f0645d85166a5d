"""Training: settings, data, the loop, checkpoints, and loading a finished run."""

from fastdiff.training.checkpoint import Checkpoint, DamagedCheckpoint
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Batches, load_dataset
from fastdiff.training.ema import EMA
from fastdiff.training.errors import RunError, UserError
from fastdiff.training.run import RunFolder
from fastdiff.training.trained import TrainedRun, load_run
from fastdiff.training.trainer import Trainer

__all__ = [
    "EMA",
    "Batches",
    "Checkpoint",
    "DamagedCheckpoint",
    "RunError",
    "RunFolder",
    "TrainConfig",
    "TrainedRun",
    "Trainer",
    "UserError",
    "load_dataset",
    "load_run",
]
