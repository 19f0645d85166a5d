"""A decoder tile by tile gives what it gives at once."""

import copy

import pytest
import torch
from nn.networks import unzero
from torch import nn

import fastdiff
from fastdiff.integrations import tiled_decode as module

AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    made = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return unzero(made).eval()


def error(vae, latents, tile, **kwargs):
    """Largest difference to the whole, over the largest value."""
    with torch.no_grad():
        whole = vae.decode(latents).sample
    tiled = fastdiff.tiled_decode(vae, latents, tile, progress=False, **kwargs)
    assert tiled.shape == whole.shape
    assert tiled.dtype == whole.dtype
    assert whole.std() > 0.01
    return ((tiled - whole).abs().max() / whole.abs().max()).item()


# Statistics merged from tiles differ by some roundings; nine normalizations pass them on.
@pytest.mark.parametrize(("height", "width", "tile"), [(30, 30, 15), (13, 21, 11), (7, 31, 16)])
def test_the_same_picture(vae, height, width, tile):
    latents = torch.randn(2, 4, height, width)
    assert error(vae, latents, tile) <= 2e-5


def test_large_means_do_no_harm(vae):
    assert error(vae, torch.randn(1, 4, 9, 25) * 0.1 + 30, 13) <= 2e-5


def test_patched_and_in_channels_last(vae):
    vae = copy.deepcopy(vae)
    report = fastdiff.patch(vae)
    assert report.places
    latents = torch.randn(1, 4, 8, 24)
    assert error(vae, latents, 12) <= 2e-5
    with torch.no_grad():
        before = vae.decode(latents).sample
    vae.to(memory_format=torch.channels_last)
    assert error(vae, latents.contiguous(memory_format=torch.channels_last), 12) <= 2e-5
    # Its own forward is back, fused.
    with torch.no_grad():
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * before.abs().max().item())
    assert all("forward" not in vars(m) for m in vae.modules())


def test_in_bfloat16(vae):
    """As far from float32 as the whole decoder in bfloat16 is."""
    latents = torch.randn(1, 4, 10, 30)
    with torch.no_grad():
        exact = vae.decode(latents).sample
        half = copy.deepcopy(vae).bfloat16()
        whole = half.decode(latents.bfloat16()).sample.float()
    tiled = fastdiff.tiled_decode(half, latents.bfloat16(), 15, progress=False)
    assert tiled.dtype == torch.bfloat16
    of_tiled, of_whole = ((y.float() - exact).square().mean().sqrt() for y in (tiled, whole))
    assert of_tiled <= 1.5 * of_whole


def test_the_margin_is_what_convolutions_see(vae, monkeypatch):
    """One narrower shows in the picture."""
    latents = torch.randn(1, 4, 40, 8)
    margin = module._margin(vae.decoder)
    monkeypatch.setattr(module, "_margin", lambda decoder: margin)
    assert error(vae, latents, 20) <= 2e-5
    monkeypatch.setattr(module, "_margin", lambda decoder: margin // 2)
    assert error(vae, latents, 20) > 1e-4


def test_no_tensor_is_larger_than_a_tile_but_the_picture(vae):
    """Of all results of operators, in a picture of nine tiles."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            sizes.extend(
                t.untyped_storage().nbytes() for t in torch.utils._pytree.tree_leaves(y)
                if isinstance(t, torch.Tensor)
            )  # fmt: skip
            return y

    latents = torch.randn(1, 4, 64, 64)
    with Watch(), torch.no_grad():
        picture = fastdiff.tiled_decode(vae, latents, 22, progress=False)
    largest_of_picture = picture.untyped_storage().nbytes()
    others = sorted(s for s in sizes if s != largest_of_picture)
    padded = 22 + 2 * module._margin(vae.decoder)
    # Sixteen channels at full resolution, and the middle block's sixteen at that of the latents.
    assert others[-1] <= max(16 * (2 * padded) ** 2, 16 * 64**2) * 4
    whole = []
    sizes = whole
    with Watch(), torch.no_grad():
        vae.decode(latents)
    assert max(whole) > 1.5 * others[-1]


def test_interruptions_leave_the_decoder_as_it_was(vae, monkeypatch):
    monkeypatch.setattr(vae.decoder.conv_out, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastdiff.tiled_decode(vae, torch.randn(1, 4, 20, 20), 8, progress=False)
    assert all("forward" not in vars(m) for m in vae.modules() if isinstance(m, nn.GroupNorm))


def test_what_it_does_not_take(vae):
    latents = torch.randn(1, 4, 20, 20)
    with pytest.raises(TypeError, match="vae is Linear, expected diffusers' AutoencoderKL"):
        fastdiff.tiled_decode(nn.Linear(1, 1), latents)
    with pytest.raises(ValueError, match=r"latents is \(4, 20, 20\), expected a tensor"):
        fastdiff.tiled_decode(vae, latents[0])
    with pytest.raises(ValueError, match="latents is list, expected a tensor"):
        fastdiff.tiled_decode(vae, [latents])
    for tile in (0, 2.5, True, -3):
        with pytest.raises(ValueError, match="expected a positive int"):
            fastdiff.tiled_decode(vae, latents, tile)
    attentive = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    )
    with pytest.raises(ValueError, match=r"up_blocks\.1\.attentions\.0 is an attention"):
        fastdiff.tiled_decode(attentive, latents)
