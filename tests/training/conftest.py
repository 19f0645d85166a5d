"""A model small enough that a training step takes milliseconds, and one thread to train it."""

import pytest
import torch

from fastdiff.nn import PRESETS, UNetConfig


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    """Make ``--preset tiny`` known: 8x8, two levels, dropout so that random states matter."""
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_groups=4,
        dropout=0.1,
    )
    monkeypatch.setitem(PRESETS, "tiny", config)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few kilobytes: threads would wait for each other (10 times as long)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
