"""A model small enough that a training step takes milliseconds, and one thread to train it."""

import numpy as np
import pytest
import tiny
import torch

from fastdiff.nn import PRESETS
from fastdiff.training.data import ArrayDataset

TINY = tiny.TINY.replace(dropout=0.1)


@pytest.fixture(autouse=True, scope="module")
def tiny_preset():
    """Make ``--preset tiny`` known: 8x8, two levels, dropout so that random states matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few kilobytes: threads would wait for each other (10 times as long)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def dataset():
    """Thirty images of noise in three classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    return ArrayDataset(images, np.arange(30) % 3, ("a", "b", "c"))
