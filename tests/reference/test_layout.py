"""The memory format an op works in, for every kind of strides."""

import pytest
import torch

from fastdiff.reference.layout import memory_format_of

IMAGES = torch.empty(2, 6, 4, 4)
LAST = IMAGES.contiguous(memory_format=torch.channels_last)
VIDEOS = torch.empty(2, 6, 3, 4, 4)
LAST_3D = VIDEOS.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (IMAGES, torch.contiguous_format),
        (LAST, torch.channels_last),
        (VIDEOS, torch.contiguous_format),
        (LAST_3D, torch.channels_last_3d),
        # Channels, rows and samples of a channels_last tensor: the channels are still innermost.
        (LAST[:, :3], torch.channels_last),
        (LAST[:, :, ::2], torch.channels_last),
        (LAST[::2], torch.channels_last),
        (LAST_3D[:, :3], torch.channels_last_3d),
        (LAST[:, ::2], torch.contiguous_format),
        (IMAGES[:, :3], torch.contiguous_format),
        (IMAGES.transpose(2, 3), torch.contiguous_format),
        # One channel: both formats at once.
        (LAST[:, :1], torch.contiguous_format),
        # No such formats: a sequence with its channels innermost, a table.
        (torch.empty(2, 5, 6).transpose(1, 2), torch.contiguous_format),
        (torch.empty(2, 6), torch.contiguous_format),
    ],
)
def test_memory_format(x, expected):
    assert memory_format_of(x) == expected
