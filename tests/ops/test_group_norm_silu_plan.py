"""The choice between the CUDA kernels of group_norm_silu: one pass, cluster or split."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness.group_norm_plan import plan as plan_on

# (shared bytes per block, multiprocessors, blocks per cluster)
A100, H100 = (163 << 10, 108, 1), (227 << 10, 132, 16)
PORTABLE = (227 << 10, 132, 8)  # where no cluster of 16 finds room
RTX_4090 = (99 << 10, 128, 1)


def plan(shape, groups, element_size, *, device=H100, **options):
    return plan_on(shape, groups, element_size, device=device, **options)


FIRST_LEVEL = (1, 128, 256 * 256)  # of ddpm_256: a group is 512 KB in bfloat16


@pytest.mark.parametrize(
    ("shape", "element_size", "options", "expected"),
    [
        # One block holds a group of 8 KB; at batch 1 four share it, to fill the device.
        ((128, 128, 1024), 2, {}, (True, 1)),
        ((1, 128, 1024), 2, {}, (True, 4)),
        ((1, 128, 1024), 2, {"device": A100}, (True, 1)),
        # A cluster of 4, 128 blocks.
        (FIRST_LEVEL, 2, {}, (True, 4)),
        (FIRST_LEVEL, 2, {"device": A100}, (False, 1)),
        (FIRST_LEVEL, 2, {"backward": True}, (True, 8)),
        # In channels_last four groups share sectors: 2 MB, and 4 MB for x and its gradient.
        (FIRST_LEVEL, 2, {"last": True}, (True, 16)),
        (FIRST_LEVEL, 2, {"last": True, "device": PORTABLE}, (False, 1)),
        (FIRST_LEVEL, 2, {"last": True, "backward": True}, (False, 1)),
        # 160 KB fit into one block of an A100, and of no 4090.
        ((1, 128, 20480), 2, {"device": A100}, (True, 1)),
        ((1, 128, 20480), 2, {"device": RTX_4090}, (False, 1)),
        # The last level of a decoder at 512x512: 2 MB per group in bfloat16, 4 MB in float32.
        ((1, 128, 512 * 512), 2, {}, (True, 16)),
        ((1, 128, 512 * 512), 2, {"device": PORTABLE}, (False, 1)),
        ((1, 128, 512 * 512), 4, {}, (False, 1)),
    ],
)
def test_choice(shape, element_size, options, expected):
    chosen = plan(shape, 32, element_size, **options)
    assert (bool(chosen.one_pass), chosen.cluster) == expected


def test_channels_last_keeps_sectors_together():
    assert plan((1, 128, 1024), 32, 2, last=True).channels == 16  # four groups of 8 bytes
    assert plan((1, 128, 1024), 32, 4, last=True).channels == 8
    assert plan((1, 384, 256), 32, 2, last=True).channels == 48  # 4 x 24 bytes are 3 sectors
    assert plan((1, 512, 256), 32, 2, last=True).channels == 16  # one group is a sector
    assert plan((1, 24, 64), 3, 2, last=True).channels == 8  # 48 bytes per pixel: no whole sectors
    assert plan((1, 64, 1), 4, 2).channels_last  # a single pixel has no rows to read


def test_small_maps_have_several_groups_in_a_block():
    """As many as fill the 4 KB that a warp takes."""
    for last in (False, True):
        chosen = plan((128, 256, 64), 32, 2, last=last)
        assert (chosen.channels, chosen.threads, chosen.samples) == (32, 32, 1)
        assert plan((128, 512, 256), 32, 2, last=last).channels == 16


def resident_warps(p, device):
    """Warps on a multiprocessor, of threads with 80 registers (a warp has 10 units of 256)."""
    warps = p.samples * p.threads // 32
    by_registers = 65536 // (256 * 10) // warps
    by_shared = (device[0] + 1024) // (p.samples * p.shared_bytes + 1024)
    return warps * min(by_registers, by_shared, 24)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("channels", "pixels"),
    [(128, 1024), (256, 1024), (384, 1024), (256, 256), (512, 256), (256, 64), (512, 64)],
)
def test_blocks_share_a_multiprocessor(channels, pixels, last, backward):
    """At least 24 warps on an H100, and 16 on an A100, where a block takes up to 75 KB.

    The backward pass of 8x8 maps keeps 8 KB for each warp, of which 21 find room.
    """
    shape = (128, channels, pixels)
    small = backward and pixels == 64
    for device, warps in ((H100, 21 if small else 24), (A100, 15 if small else 16)):
        chosen = plan(shape, 32, 2, device=device, last=last, backward=backward)
        if chosen.shared_bytes <= 75 << 10:
            assert resident_warps(chosen, device) >= warps, chosen


@pytest.mark.parametrize(
    ("batch", "pixels", "element_size", "samples"),
    [
        # What a channel leaves, 16 bytes written and read, by the 96 bytes of x, grad and grad_x.
        (16, 16, 2, 4),
        (128, 16, 2, 4),
        (128, 16, 4, 2),
        (128, 64, 2, 1),
        (128, 64, 4, 1),
        # Odd batches are not padded, and blocks of a single sample fill the device.
        (6, 16, 2, 2),
        (7, 16, 2, 1),
        (2, 1024, 2, 1),
    ],
)
def test_small_maps_share_a_block(batch, pixels, element_size, samples):
    shape = (batch, 512, pixels)
    assert plan(shape, 32, element_size, backward=True).samples == samples
    assert plan(shape, 32, element_size, backward=True, device=A100).samples == samples
    assert plan(shape, 32, element_size).samples == 1


def test_split_fills_the_device_at_batch_1():
    """Even 32 groups of a single sample give two blocks to every multiprocessor."""
    for last in (False, True):
        chosen = plan((1, 128, 512 * 512), 32, 4, last=last)
        assert not chosen.one_pass
        assert chosen.blocks_per_sample >= 2 * 132


@st.composite
def _shapes(draw):
    groups, size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    pixels = draw(st.one_of(st.integers(1, 70), st.integers(1, 300_000)))
    return (draw(st.integers(1, 200)), groups * size, pixels), groups


@settings(max_examples=300, deadline=None)
@given(
    _shapes(),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([A100, H100, PORTABLE, RTX_4090]),
)
def test_every_plan_is_valid(shape_and_groups, element_size, last, backward, device):
    shape, groups = shape_and_groups
    batch, channels, pixels = shape
    vector = 16 // element_size
    inner = channels if last or pixels == 1 else pixels
    options = {"device": device, "last": last, "backward": backward, "vector": inner % vector == 0}
    p = plan(shape, groups, element_size, **options)
    width = vector if options["vector"] else 1

    # The items cover all channels and pixels once, in whole vectors and whole groups.
    assert channels % p.channels == 0
    assert p.channels % (channels // groups) == 0
    assert (p.blocks - 1) * p.block_channels < p.channels <= p.blocks * p.block_channels
    assert (p.segments - 1) * p.segment_pixels < pixels <= p.segments * p.segment_pixels
    assert (p.block_channels if p.channels_last else p.segment_pixels) % width == 0
    assert p.channels % width == 0 or not p.channels_last
    assert p.lanes in (1, 2, 4, 8, 16, 32)
    assert p.lanes * width >= p.block_channels or not p.channels_last

    assert p.threads % 32 == 0
    if p.one_pass:
        assert p.cluster in (1, 2, 4, 8, 16)
        assert p.cluster <= device[2]
        assert p.cluster * p.items_per_block >= p.blocks * p.segments
        assert 32 <= p.threads <= 512
        assert p.blocks_per_sample == channels // p.channels * p.cluster
        assert batch % p.samples == 0
        assert p.samples * p.threads <= 512
        assert p.samples == 1 or (backward and p.cluster == 1)
        assert p.samples * p.shared_bytes <= device[0]
        data = (2 if backward else 1) * p.channels * pixels * element_size
        assert data <= p.cluster * p.shared_bytes
        assert p.shared_bytes <= device[0]
    else:
        assert p.channels == channels
        assert (p.chunks - 1) * p.chunk_segments < p.segments <= p.chunks * p.chunk_segments
        assert p.chunk_blocks == 1 or p.chunks == 1
        # What the kernels ask for stays below 48 KB, which needs no opt-in, plus coefficients.
        partials = p.chunk_blocks * p.block_channels * p.chunk_segments
        assert 4 * 3 * partials <= 48 << 10
        assert p.chunk_blocks * p.block_channels <= 1024

    # The batch decides how many blocks share the work, not how it is cut.
    alone = plan((1, channels, pixels), groups, element_size, **options)
    assert (alone.one_pass, alone.tiling) == (p.one_pass, p.tiling)
