"""Checkpoints of DDPM, DDIM, improved- and guided-diffusion compute the same here."""

import pickle

import pytest
import torch
from integrations.openai_unet import AttentionBlock, UNetModel
from nn.networks import SMALL, inputs, unzero
from nn.original_ddpm import Model

from fastdiff.nn import PRESETS, RELEASED, NoisyClassifier, UNet
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


# guided-diffusion's features together, in a small network of levels of different widths.
ADM = RELEASED["adm_imagenet512"].replace(
    sample_size=16, channels=32, channel_mult=(0.5, 1, 2), attention_resolutions=(8, 4),
    num_head_channels=8, num_groups=4, num_classes=5,
)  # fmt: skip
SIZES = {  # parameters of the released networks, counted with the repositories' own code
    "adm_imagenet64": 295_904_454,
    "adm_imagenet128": 421_529_606,
    "adm_imagenet256": 553_838_086,
    "adm_256": 552_814_086,
    "adm_imagenet512": 558_997_638,
    "adm_upsampler256": 311_795_910,
    "adm_upsampler512": 308_835_270,
    "adm_classifier64": 65_438_568,
    "adm_classifier128": 42_568_040,
    "adm_classifier256": 54_096_360,
    "adm_classifier512": 54_448_360,
    "iddpm_imagenet64": 121_063_942,
    "iddpm_imagenet64_cond": 273_049_350,
    "iddpm_upsampler256": 279_792_390,
    "iddpm_bedroom256": 113_676_678,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_released_networks(name):
    assert SIZES.keys() == RELEASED.keys()
    config, order = RELEASED[name], name == "adm_imagenet64"
    with torch.device("meta"):
        if "classifier" in name:
            theirs = UNetModel(config, pool="attention", num_classes=1000)
            ours = NoisyClassifier.from_original(theirs.state_dict(), name)
        else:
            theirs = UNetModel(config, new_order=order)
            ours = UNet.from_original(theirs.state_dict(), name)
    assert ours.config == config
    counts = [sum(p.numel() for p in network.parameters()) for network in (theirs, ours)]
    assert counts == [SIZES[name]] * 2


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_head_channels": None, "num_heads": 4},
        {"resblock_updown": False},
        {"time_conditioning": "additive", "channel_mult": (1, 1.5, 2)},
    ],
)
def test_features_of_guided_diffusion(changes, new_order):
    config = ADM.replace(**changes)
    theirs = unzero(UNetModel(config, new_order=new_order))
    ours = UNet.from_original(theirs.state_dict(), config, new_attention_order=new_order)
    same(theirs, ours)
    same(theirs, ours.set_merged(True))
    same(theirs, ours.set_merged(None).set_recompute())
    x, t, y = inputs(ours)
    with torch.no_grad():
        expected, actual = theirs(x, t, y), ours.for_inference()(x, t, y)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    theirs(x, t, y).square().sum().backward()
    ours(x, t, y).square().sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, part in (("conv_in", "input_blocks.0.0"), ("conv_out", "out.2")):
        expected = theirs.get_parameter(f"{part}.weight").grad
        error = (gradients[f"{name}.weight"] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("theirs", "ours"), [("attention", "attention"), ("adaptive", "mean")])
def test_classifiers_of_guided_diffusion(theirs, ours):
    config = ADM.replace(num_classes=None, learned_variance=False)
    original = unzero(UNetModel(config, pool=theirs, num_classes=7)).eval()
    loaded = NoisyClassifier.from_original(original.state_dict(), config, 7, ours)
    x_t, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 10, 999])
    expected, actual = original(x_t, t), loaded(x_t, t)
    assert expected.std() > 0.01
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    wanted = "mean" if ours == "attention" else "attention"
    with pytest.raises(UnknownCheckpointError, match=f'use pool="{ours}"'):
        NoisyClassifier.from_original(original.state_dict(), config, 7, wanted)
    if ours == "attention":
        with pytest.raises(ValueError, match=r"16 x 16 pixels for pooling .* got 8 x 8"):
            loaded(x_t[..., :8, :8], t)


def test_heads_that_tensors_do_not_tell_are_those_of_the_released_network():
    name = "adm_imagenet64"
    with torch.device("meta"):
        state = UNetModel(RELEASED[name], new_order=True).state_dict()
    for changes, order in (
        ({"num_head_channels": 32}, None),
        ({"num_head_channels": None, "num_heads": 4}, None),
        ({}, False),
    ):
        config = RELEASED[name].replace(**changes)
        with pytest.raises(UnknownCheckpointError, match=f"'{name}'"):
            UNet.from_original(state, config, new_attention_order=order)
    UNet.from_original(state, RELEASED[name], new_attention_order=True)
    with torch.device("meta"):
        classifier = UNetModel(RELEASED["adm_classifier64"], pool="attention", num_classes=1000)
    config = RELEASED["adm_classifier64"].replace(num_head_channels=32)
    with pytest.raises(UnknownCheckpointError, match="'adm_classifier64'"):
        NoisyClassifier.from_original(classifier.state_dict(), config)


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
