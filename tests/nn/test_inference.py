"""The inference form: the U-Net's results to rounding, never those of old weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nn.networks import SMALL, build, inputs
from torch import Tensor, nn

import fastdiff
from fastdiff.nn import UNet, packed_conv
from fastdiff.nn.inference import InferenceUNet
from fastdiff.training.trained import Computed

CPU_KERNELS = pytest.mark.skipif(
    fastdiff.default_backend("cpu") != "cpu", reason="samplers use the form with compiled kernels"
)


def wide(name: str, **changes) -> UNet:
    """With 16 channels and maps of 16x16 and 8x8: Winograd, and below them none."""
    changes = {"channels": 16, "num_groups": 4, **changes}
    return build(name, **changes).requires_grad_(False)


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).abs().max() / exact.abs().max())


def exact_of(unet: UNet, *arguments: Tensor) -> Tensor:
    return copy.deepcopy(unet).double()(
        *(a.double() if a.is_floating_point() else a for a in arguments)
    )


def close(y: Tensor, unet: UNet, *arguments: Tensor) -> None:
    """As near to float64 as twice the U-Net's own error, and a few roundings."""
    exact = exact_of(unet, *arguments)
    with torch.no_grad():
        own = error(unet(*arguments), exact)
    assert y.dtype == torch.float32
    assert error(y, exact) <= 2 * own + 1e-6


@pytest.mark.parametrize("changes", ["", "classes", "learned_variance", "scale_shift", "no_conv"])
@pytest.mark.parametrize("name", SMALL)
def test_predicts_what_the_network_predicts(name: str, changes: str) -> None:
    fields = {
        "": {},
        "classes": {"num_classes": 3, "null_class": True},
        "learned_variance": {"learned_variance": True, "num_heads": 2},
        "scale_shift": {"time_conditioning": "scale_shift", "downsample_padding": "both"},
        "no_conv": {"conv_resample": False, "mid_attention": False},
    }[changes]
    unet = wide(name, **fields)
    arguments = inputs(unet)
    form = unet.for_inference()
    close(form(*arguments), unet, *arguments)


@pytest.mark.parametrize("height_width", [(4, 4), (8, 20), (28, 12)])
def test_other_sizes_batches_and_formats(height_width: tuple[int, int]) -> None:
    """Maps that Winograd takes, and odd ones and small ones, which it does not, in one network."""
    unet = wide("mnist", attention_resolutions=(), sample_size=8)
    form = unet.for_inference()
    for batch in (3, 1, 3, 0):
        x_t = torch.randn(batch, 1, *height_width)
        t = torch.randint(1000, (batch,))
        y = form(x_t, t)
        assert y.shape == x_t.shape
        assert y.is_contiguous()
        if batch:
            close(y, unet, x_t, t)
    x_t, t = torch.randn(2, 1, *height_width), torch.tensor([0.5, 900.0])
    last = unet(x_t.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(form(x_t, t), last, rtol=1e-4, atol=1e-4)


def test_self_conditioning() -> None:
    unet = wide("mnist", self_conditioning=True)
    x_t, t = inputs(unet)
    form, estimate = unet.for_inference(), torch.randn_like(x_t)
    close(form(x_t, t), unet, x_t, t)
    torch.testing.assert_close(
        form(x_t, t, x_self_cond=estimate), unet(x_t, t, x_self_cond=estimate), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["ddpm_cifar10", "iddpm_cifar10"])
def test_bfloat16_throughout_is_as_close_as_autocast(name: str) -> None:
    unet = wide(name, channels=32)
    x_t, t = inputs(unet, batch=8)
    exact = exact_of(unet, x_t, t)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        autocast = unet(x_t, t).float()
    y = unet.for_inference(torch.bfloat16)(x_t, t)
    assert y.dtype == torch.float32
    rms = [float((v.double() - exact).square().mean().sqrt()) for v in (y, autocast)]
    assert rms[0] <= 1.5 * rms[1], "root mean square errors of the form and of autocast"


def test_without_reordered_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_conv, "_has_packed_weights", lambda dtype: False)
    unet = wide("ddpm_cifar10")
    arguments = inputs(unet)
    close(InferenceUNet(unet)(*arguments), unet, *arguments)


def test_on_the_reference_backend() -> None:
    unet = wide("ddpm_cifar10")
    arguments = inputs(unet)
    with fastdiff.use_backend("reference"):
        y = unet.for_inference()(*arguments)
        assert unet.sampling_form() is unet
    close(y, unet, *arguments)


def change_in_place(unet: UNet) -> None:
    unet.mid_block.resnets[0].conv1.weight.mul_(2)


def load(unet: UNet) -> None:
    unet.load_state_dict({k: v * 1.1 for k, v in unet.state_dict().items()})


def replace_parameter(unet: UNet) -> None:
    unet.conv_in.weight = nn.Parameter(unet.conv_in.weight * 2, requires_grad=False)


def replace_storage(unet: UNet) -> None:
    unet.conv_out.bias.data = unet.conv_out.bias.data + 1


def replace_module(unet: UNet) -> None:
    unet.conv_out = copy.deepcopy(unet.conv_out)
    unet.conv_out.bias.data.add_(1)


def train_a_step(unet: UNet) -> None:
    unet.requires_grad_(True)
    with torch.enable_grad():
        unet(*inputs(unet)).square().mean().backward()
    torch.optim.AdamW(unet.parameters(), lr=0.1).step()
    unet.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        load,
        replace_parameter,
        replace_storage,
        replace_module,
        train_a_step,
    ],
)
def test_changed_weights_are_noticed(change) -> None:
    unet = wide("mnist")
    arguments = inputs(unet)
    form = unet.for_inference()
    before = form(*arguments)
    change(unet)
    after = form(*arguments)
    assert (after - before).abs().max() > 1e-3
    close(after, unet, *arguments)


def test_dropout_does_not_happen_and_training_mode_stays() -> None:
    unet = wide("mnist", dropout=0.5).train()
    arguments = inputs(unet)
    y = unet.for_inference()(*arguments)
    assert unet.training
    close(y, unet.eval(), *arguments)


def test_state_copies_and_pickles_have_no_form() -> None:
    unet = wide("mnist")
    names, arguments = list(unet.state_dict()), inputs(unet)
    y = unet.for_inference()(*arguments)
    assert unet.for_inference() is unet.for_inference()
    assert list(unet.state_dict()) == names
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert "_inference_forms" not in other.__dict__
        assert other.for_inference().unet is other
        assert torch.equal(other.for_inference()(*arguments), y)


class Other(UNet):
    pass


def with_hook(unet: UNet) -> None:
    unet.conv_in.register_forward_hook(lambda *_: None)


def with_pre_hook(unet: UNet) -> None:
    unet.register_forward_pre_hook(lambda *_: None)


def with_foreign_layer(unet: UNet) -> None:
    class LoRA(nn.Linear):
        pass

    old = unet.mid_block.attentions[0].to_q
    unet.mid_block.attentions[0].to_q = LoRA(old.in_features, old.out_features)


def with_parametrization(unet: UNet) -> None:
    nn.utils.parametrizations.weight_norm(unet.conv_in)


def with_own_forward(unet: UNet) -> None:
    unet.mid_block.forward = lambda h, temb: h


CHANGED = [with_hook, with_pre_hook, with_foreign_layer, with_parametrization, with_own_forward]


@pytest.mark.parametrize("change", CHANGED)
def test_what_it_would_not_compute_is_refused_and_sampled_as_it_is(change) -> None:
    unet = wide("mnist")
    form = unet.for_inference()
    change(unet)
    assert unet.sampling_form() is unet
    with pytest.raises(ValueError, match="no inference form"):
        InferenceUNet(unet)
    if change in (with_foreign_layer, with_parametrization):
        with pytest.raises(RuntimeError, match="no inference form any more"):
            form(*inputs(unet))


def test_where_there_is_none() -> None:
    unet = wide("mnist")
    with pytest.raises(TypeError, match=r"dtype is torch.float16"):
        unet.for_inference(torch.float16)
    for other, message in (
        (copy.deepcopy(unet).double(), "float64, not float32"),
        (copy.deepcopy(unet).to("meta"), "not a tensor on a CPU"),
        (Other(unet.config), "Other has no inference form"),
    ):
        with pytest.raises(ValueError, match=message):
            other.for_inference()
        assert other.sampling_form() is other
    with torch.autocast("cpu", torch.bfloat16):
        assert unet.sampling_form() is unet
    unet.use_inference_form = False
    assert unet.sampling_form() is unet


def test_bad_inputs_are_the_networks_errors() -> None:
    form = wide("mnist").for_inference()
    with pytest.raises(ValueError, match="x_t must have shape"):
        form(torch.zeros(1, 3, 8, 8), torch.zeros(1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The x_t of every call of an inference form."""
    seen: list[Tensor] = []
    call = InferenceUNet.__call__

    def counted(self, x_t, *arguments, **options):
        seen.append(x_t)
        return call(self, x_t, *arguments, **options)

    monkeypatch.setattr(InferenceUNet, "__call__", counted)
    return seen


@CPU_KERNELS
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["DDIM", "DDPM", "Heun"])
def test_samplers_use_it_to_the_same_images(name: str, guided: bool, calls: list[Tensor]) -> None:
    unet = wide("mnist", num_classes=3, null_class=True, self_conditioning=guided)
    diffusion = fastdiff.GaussianDiffusion(
        fastdiff.NoiseSchedule.linear(100), self_conditioning=guided
    )
    sampler = getattr(fastdiff.samplers, name)(diffusion, 4)
    y = torch.tensor([0, 2])
    options = {"seed": 3, "progress": False, "model_kwargs": {"y": y}}
    if guided:
        options["guidance"] = fastdiff.ClassifierFree(2.0, {"y": torch.full_like(y, 3)})
    size = unet.config.sample_size
    images = sampler.sample(unet, (2, 1, size, size), **options)
    used = len(calls)
    assert used >= 4 * (2 if guided else 1)
    unet.use_inference_form = False
    expected = sampler.sample(unet, (2, 1, size, size), **options)
    assert len(calls) == used
    # float32's error in eps, times noise over signal, over four steps of a random network.
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


@CPU_KERNELS
def test_encoding_and_bounds_use_it(calls: list[Tensor]) -> None:
    unet = wide("mnist")
    diffusion = fastdiff.GaussianDiffusion(fastdiff.NoiseSchedule.linear(6))
    size = unet.config.sample_size
    x0 = torch.rand(2, 1, size, size) * 2 - 1
    ddim = fastdiff.samplers.DDIM(diffusion, 3)
    results = [
        lambda: ddim.encode(unet, x0, progress=False),
        lambda: diffusion.bits_per_dim(unet, x0, seed=0, progress=False).total,
    ]
    for result in results:
        calls.clear()
        found = result()
        assert calls
        unet.use_inference_form = False
        torch.testing.assert_close(found, result(), rtol=1e-3, atol=1e-3)
        unet.use_inference_form = True


@CPU_KERNELS
def test_what_runs_of_a_run_that_computes_under_autocast() -> None:
    unet = wide("mnist")
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16)):
        assert Computed(unet, amp, compiled=False).sampling_form() is unet.for_inference(dtype)
    for network in (Computed(unet, "fp16", compiled=False), Computed(unet, "bf16", compiled=True)):
        assert network.sampling_form() is network
    unet.use_inference_form = False
    network = Computed(unet, "bf16", compiled=False)
    assert network.sampling_form() is network
