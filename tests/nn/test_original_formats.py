"""Checkpoints of DDPM, DDIM, improved- and guided-diffusion compute the same here."""

import pickle

import pytest
import torch
from integrations.openai_unet import AttentionBlock, UNetModel
from nn.networks import SMALL, inputs, unzero
from nn.original_ddpm import Model

from fastdiff.nn import PRESETS, UNet
from fastdiff.nn.original_formats import UnknownCheckpointError

ORIGINALS = {
    "ddpm_cifar10": Model,
    "ddpm_256": Model,
    "ddim_celeba64": Model,
    "iddpm_cifar10": UNetModel,
}


def same(theirs, ours):
    arguments = inputs(ours)
    with torch.no_grad():
        expected, actual = theirs.eval()(*arguments), ours(*arguments)
    assert expected.std() > 0.01
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ORIGINALS)
def test_same_output_as_the_original_code(name):
    theirs = unzero(ORIGINALS[name](SMALL[name]))
    ours = UNet.from_original(theirs.state_dict(), SMALL[name])
    assert not ours.training
    assert all(p.requires_grad for p in ours.parameters())
    same(theirs, ours)


@pytest.mark.parametrize("name", ORIGINALS)
def test_published_sizes(name):
    with torch.device("meta"):
        state = ORIGINALS[name](PRESETS[name]).state_dict()
    ours = UNet.from_original(state, name)
    assert ours.config == PRESETS[name]


def test_classes_and_heads_of_guided_diffusion():
    config = SMALL["iddpm_cifar10"].replace(num_classes=3)
    theirs = unzero(UNetModel(config))
    same(theirs, UNet.from_original(theirs.state_dict(), config))
    # The newer order of channels in qkv: the same network with its rows sorted so.
    state = theirs.state_dict()
    for name, module in theirs.named_modules():
        if isinstance(module, AttentionBlock):
            for key in (f"{name}.qkv.weight", f"{name}.qkv.bias"):
                by_head = state[key].unflatten(0, (config.num_heads, 3, -1))
                state[key] = by_head.transpose(0, 1).flatten(0, 2)
    same(theirs, UNet.from_original(state, config, new_attention_order=True))


def test_files(tmp_path):
    config = SMALL["ddpm_cifar10"]
    theirs, average = unzero(Model(config), 1), unzero(Model(config), 2)
    parallel = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    optimizer = torch.optim.Adam(theirs.parameters()).state_dict()
    path = tmp_path / "ckpt.pth"
    torch.save([parallel, optimizer, 3, 1000, average.state_dict()], path)
    same(average, UNet.from_original(path, config))
    torch.save([parallel, optimizer, 3, 1000], path)
    same(theirs, UNet.from_original(path, config))
    from safetensors.torch import save_file

    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    same(theirs, UNet.from_original(tmp_path / "model.safetensors", config))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint was run')",))


def test_what_does_not_fit(tmp_path):
    config = SMALL["ddpm_cifar10"]
    state = Model(config).state_dict()
    with pytest.raises(UnknownCheckpointError, match="found a, b"):
        UNet.from_original({"a": torch.ones(1), "b": torch.ones(1)}, config)
    with pytest.raises(UnknownCheckpointError, match=r"shape: conv_in.* for .* in all\)"):
        UNet.from_original(state, config.replace(channels=16))
    with pytest.raises(UnknownCheckpointError, match=r"missing: down\.0\.block\.2\.norm1"):
        UNet.from_original(state, config.replace(num_res_blocks=3))
    with pytest.raises(UnknownCheckpointError, match="unexpected: extra"):
        UNet.from_original({**state, "extra": torch.ones(1)}, config)
    with pytest.raises(ValueError, match="unknown U-Net preset"):
        UNet.from_original(state, "ddpm")
    with pytest.raises(FileNotFoundError):
        UNet.from_original(tmp_path / "none.pt", config)
    path = tmp_path / "evil.pt"
    torch.save({"model": Evil()}, path)
    with pytest.raises(pickle.UnpicklingError):
        UNet.from_original(path, config)
    torch.save({"model": state}, path)
    with pytest.raises(UnknownCheckpointError, match="expected a state dict"):
        UNet.from_original(path, config)


def test_save_pretrained_is_a_diffusers_folder(tmp_path):
    unet2d_model = pytest.importorskip("diffusers").UNet2DModel
    ours = unzero(UNet(SMALL["iddpm_cifar10"])).eval()
    ours.save_pretrained(tmp_path / "unet")
    theirs = unet2d_model.from_pretrained(tmp_path / "unet")
    x_t, t = inputs(ours)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x_t, t).sample, ours(x_t, t), rtol=1e-5, atol=1e-5)
