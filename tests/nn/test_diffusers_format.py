"""Folders that diffusers reads, and networks that compute the same there."""

import json
import subprocess
import sys

import pytest
import torch
from nn.networks import SMALL, build, inputs

from fastdiff.nn import PRESETS, RELEASED, UNet
from fastdiff.nn.diffusers_format import (
    UnsupportedByDiffusersError,
    config_from_unet2d,
    ddpm_scheduler_config,
    save_pretrained,
    unet2d_config,
)

pytest.importorskip("safetensors")
BETAS = torch.linspace(1e-4, 0.02, 20, dtype=torch.float64)


@pytest.fixture(scope="module")
def unet2d_model():
    return pytest.importorskip("diffusers").UNet2DModel


@pytest.mark.parametrize("name", PRESETS)
def test_same_parameters_as_diffusers(name, unet2d_model):
    with torch.device("meta"):
        theirs = unet2d_model(**unet2d_config(PRESETS[name]))
        ours = UNet(PRESETS[name])
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("name", SMALL)
def test_same_output_as_diffusers(name, num_classes, unet2d_model):
    unet = build(name, num_classes=num_classes)
    theirs = unet.to_diffusers()
    assert type(theirs) is unet2d_model
    assert not theirs.training
    x_t, t, *y = inputs(unet)
    with torch.no_grad():
        expected = theirs(x_t, t, *y).sample
        output = unet(x_t, t, *y)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * _scale(expected))
        back = UNet.from_diffusers(theirs)
        torch.testing.assert_close(back(x_t, t, *y), output, rtol=0, atol=0)
    assert back.config == unet.config


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("name", ["ddpm_cifar10", "iddpm_cifar10", "digits"])
def test_same_gradients_as_diffusers(name, layout, unet2d_model):
    """Of every weight and of x_t, relative to the largest of the tensor, and less kept for them."""
    unet = build(name)
    x_t, t, *y = inputs(unet)
    generator = torch.Generator().manual_seed(3)
    gradients, kept = [], []
    for module in (unet, unet.to_diffusers()):
        module = module.to(memory_format=getattr(torch, layout))
        x = x_t.clone(memory_format=getattr(torch, layout)).requires_grad_()
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = module(x, t, *y)
        output = output if module is unet else output.sample
        output.backward(torch.randn(output.shape, generator=generator.manual_seed(3)))
        gradients.append({"x_t": x.grad} | {k: p.grad for k, p in module.named_parameters()})
        kept.append(sum(saved.values()))
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if key.endswith("to_k.bias"):  # softmax does not depend on it: what is left are roundings
            assert ours[key].abs().max() < 1e-5 * ours[key.replace(".bias", ".weight")].abs().max()
            continue
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            ours[key], expected, rtol=0, atol=1e-5 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert kept[0] < kept[1]


def _scale(expected):
    return max(1.0, expected.abs().max().item())


SAMPLE = """
import sys, torch
from diffusers import DDPMPipeline
for folder in sys.argv[1:]:
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    images = pipeline(batch_size=2, generator=torch.Generator().manual_seed(0),
                      num_inference_steps=20, output_type="pt").images
    torch.save({"images": images, "x_t": (x := torch.ones(1, *images.shape[1:])),
                "output": pipeline.unet(x, 7).sample.detach(),
                "betas": pipeline.scheduler.betas}, folder + "/out.pt")
assert "fastdiff" not in sys.modules
"""


def test_pipeline_loads_in_a_process_without_us(tmp_path):
    pytest.importorskip("diffusers")
    unets = {}
    for name in ("digits", "iddpm_cifar10"):
        unet = unets[str(tmp_path / name)] = build(name).to(memory_format=torch.channels_last)
        variance = "learned_range" if unet.config.learned_variance else "fixed_large"
        save_pretrained(unet, tmp_path / name, ddpm_scheduler_config(BETAS, variance=variance))
    result = subprocess.run(
        [sys.executable, "-c", SAMPLE, *unets], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    # A setting that diffusers does not know, or weights that do not fit, are warnings there.
    assert "not expected" not in result.stderr
    assert "not initialized" not in result.stderr
    for folder, unet in unets.items():
        out = torch.load(f"{folder}/out.pt")
        with torch.no_grad():
            expected = unet(out["x_t"], torch.tensor([7]))
        torch.testing.assert_close(out["output"], expected, rtol=1e-5, atol=1e-5 * _scale(expected))
        assert torch.equal(out["betas"], BETAS.float())
        assert out["images"].isfinite().all()


def test_loading_gives_back_the_network(tmp_path):
    unet = build("ddpm_cifar10", num_classes=3)
    save_pretrained(unet, tmp_path, ddpm_scheduler_config(BETAS))
    for folder in (tmp_path, tmp_path / "unet"):
        again = UNet.from_diffusers(folder)
        assert again.config == unet.config
        assert torch.equal(again(*inputs(unet)), unet(*inputs(unet)))
        assert all(p.requires_grad for p in again.parameters())


def test_attention_names_of_old_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file

    unet = build("ddpm_cifar10")
    save_pretrained(unet, tmp_path, ddpm_scheduler_config(BETAS))
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for new, name in old.items():
        state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, path)
    assert torch.equal(UNet.from_diffusers(tmp_path)(*inputs(unet)), unet(*inputs(unet)))


def test_settings_round_trip_through_json():
    odd = PRESETS["ddpm_cifar10"].replace(
        channels=96, channel_mult=(1, 5 / 3, 1.5, 2), num_groups=16
    )
    expressible = (RELEASED[name] for name in ("adm_imagenet64", "adm_256", "iddpm_bedroom256"))
    for config in (*PRESETS.values(), *expressible, odd):
        settings = json.loads(json.dumps(unet2d_config(config)))
        assert config_from_unet2d(settings) == config


def test_what_diffusers_cannot_express_is_an_error(tmp_path):
    with pytest.raises(UnsupportedByDiffusersError, match="conv_resample=False"):
        unet2d_config(SMALL["digits"].replace(conv_resample=False))
    several = PRESETS["ddim_celeba64"].replace(num_heads=4)
    with pytest.raises(UnsupportedByDiffusersError, match=r"different widths, \[256, 512\]"):
        unet2d_config(several)
    with pytest.raises(
        UnsupportedByDiffusersError, match="128 channels and a time embedding of 256"
    ):
        unet2d_config(RELEASED["adm_imagenet512"])
    folder = tmp_path / "model"
    with pytest.raises(UnsupportedByDiffusersError):
        save_pretrained(build("digits", conv_resample=False), folder, {})
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu'; only 'silu'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        ({"sample_size": [32, 16]}, "sample_size"),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "in the reverse order"),
        ({"freq_shift": 0}, "flip_sin_to_cos = False and freq_shift = 0"),
        ({"out_channels": 4}, "3 input and 4 output channels"),
        ({"attention_head_dim": 96}, "attention_head_dim = 96"),
        ({"attn_norm_num_groups": 16}, "attn_norm_num_groups = 16"),
        (
            {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None},
            "attn_norm_num_groups = None",
        ),
    ],
)
def test_what_we_cannot_express_is_an_error(changes, message):
    settings = unet2d_config(PRESETS["ddpm_cifar10"]) | changes
    with pytest.raises(UnsupportedByDiffusersError, match=message):
        config_from_unet2d(settings)


def test_scheduler_settings():
    settings = ddpm_scheduler_config(BETAS, "v", "fixed_small", clip_denoised=False)
    assert settings["trained_betas"] == BETAS.tolist()
    assert settings["num_train_timesteps"] == 20
    assert settings["prediction_type"] == "v_prediction"
    assert settings["variance_type"] == "fixed_small"
    assert settings["clip_sample"] is False
    with pytest.raises(UnsupportedByDiffusersError, match=r"eps, x0, v .*'mean'"):
        ddpm_scheduler_config(BETAS, "mean")
    with pytest.raises(UnsupportedByDiffusersError, match="variance must be one of"):
        ddpm_scheduler_config(BETAS, variance="tiny")
