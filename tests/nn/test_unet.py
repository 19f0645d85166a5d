"""The U-Net: published sizes, what enters where, memory formats, dtypes, errors."""

import copy
import json

import pytest
import torch
from nn.networks import SMALL, build, inputs

from fastdiff.nn import PRESETS, GroupNormSiLU, UNet, UNetConfig

# float32 rounding (6e-8) through ~40 layers of unit scale, each a sum of up to 200 products.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ddpm_cifar10", 35_746_307),
        ("ddpm_256", 113_673_219),
        ("ddim_celeba64", 78_700_803),
        ("iddpm_cifar10", 52_546_438),
    ],
)
def test_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        unet = UNet.from_preset(name)
        config = unet.config
        shape = (2, config.in_channels, config.sample_size, config.sample_size)
        y = unet(torch.empty(shape), torch.zeros(2, dtype=torch.int64))
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert y.shape == (2, config.out_channels, *shape[2:])


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    unet = build(name, num_classes=3).train()
    unet(*inputs(unet)).square().mean().backward()
    # A bias before a normalization of one group would get none; these have several channels per
    # group, so only classes that are not in the batch may be without.
    for key, parameter in unet.named_parameters():
        if key == "mid_block.attentions.0.to_k.bias" or key.endswith("to_k.bias"):
            continue  # softmax does not see a constant added to the keys
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


def test_a_fresh_network_is_zero_and_its_blocks_are_identities():
    torch.manual_seed(0)
    unet = UNet(SMALL["ddpm_cifar10"])
    x_t, t = inputs(unet)
    assert torch.equal(unet(x_t, t), torch.zeros_like(x_t))
    block = unet.mid_block
    h = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(h, torch.randn(2, 32)), h)


def test_initialisation_is_fan_avg_uniform():
    torch.manual_seed(0)
    weight = UNet(SMALL["ddpm_cifar10"].replace(channels=64)).down_blocks[0].resnets[0].conv1.weight
    limit = (6 / (64 * 9 + 64 * 9)) ** 0.5
    assert weight.abs().max() <= limit
    # Variance of a uniform distribution, whose sample variance over n draws has relative
    # deviation sqrt(0.8 / n) = 0.0047 for n = 36864; five of them.
    assert weight.var().item() == pytest.approx(limit**2 / 3, rel=0.024)


@pytest.mark.parametrize("name", SMALL)
def test_every_timestep_and_image_counts_and_only_its_own(name):
    unet = build(name)
    x_t, t = inputs(unet)
    with torch.no_grad():
        y = unet(x_t, t)
        alone = torch.cat([unet(x_t[i : i + 1], t[i : i + 1]) for i in range(3)])
        later = unet(x_t, t + torch.tensor([0, 50, 0]))
    torch.testing.assert_close(alone, y, **FLOAT32)
    changed = (later - y).abs().amax((1, 2, 3))
    assert changed[1] > 0.01
    assert changed[[0, 2]].max() <= 1e-4


@pytest.mark.parametrize("conditioning", ["additive", "scale_shift"])
def test_time_enters_the_second_normalization(conditioning):
    """A block computed from its parts, with torch's own GroupNorm."""
    unet = build("mnist", time_conditioning=conditioning)
    block = unet.up_blocks[0].resnets[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, block.norm1.num_channels, 6, 6, generator=generator)
    temb = torch.randn(2, 32, generator=generator)

    def norm(layer, h):
        return torch.nn.functional.group_norm(
            h, layer.num_groups, layer.weight, layer.bias, layer.eps
        )

    time = block.time_emb_proj(temb)[:, :, None, None]
    h = block.conv1(torch.nn.functional.silu(norm(block.norm1, x)))
    if conditioning == "additive":
        h = norm(block.norm2, h + time)
    else:
        scale, shift = time.chunk(2, dim=1)
        h = norm(block.norm2, h) * (1 + scale) + shift
    expected = block.conv_shortcut(x) + block.conv2(torch.nn.functional.silu(h))
    torch.testing.assert_close(block(x, temb), expected, **FLOAT32)


def test_class_conditioning_changes_the_output():
    unet = build("digits", num_classes=3, null_class=True)
    x_t, t, _ = inputs(unet, batch=1)
    with torch.no_grad():
        outputs = [unet(x_t, t, torch.tensor([k])) for k in range(4)]
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 0.01, (i, j)


def test_dropout_acts_in_training_only():
    unet = build("digits", dropout=0.5)
    x_t, t = inputs(unet)
    torch.manual_seed(0)
    assert torch.equal(unet(x_t, t), unet(x_t, t))
    unet.train()
    assert (unet(x_t, t) - unet(x_t, t)).abs().max() > 0.01


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_everywhere(name):
    unet = build(name, num_classes=3)
    x_t, *rest = inputs(unet)
    expected = unet(x_t, *rest)
    unet.to(memory_format=torch.channels_last)
    others = []

    def check(module, args, output):
        maps = [a for a in (*args, output) if isinstance(a, torch.Tensor) and a.dim() == 4]
        if not all(a.is_contiguous(memory_format=torch.channels_last) for a in maps):
            others.append(type(module).__name__)

    handles = [m.register_forward_hook(check) for m in unet.modules()]
    x_last = x_t.to(memory_format=torch.channels_last)
    with torch.profiler.profile(record_shapes=True) as profile:
        y = unet(x_last, *rest)
    for handle in handles:
        handle.remove()
    assert not others
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, **FLOAT32)
    # Whatever changes the layout of a tensor (contiguous, reshape, flatten) clones it. The means of
    # a normalization are cloned too: they have at most B * 2 * width elements, maps at least
    # B * 4 * width at the lowest resolution and more above.
    small = 2 * len(x_t) * max(unet.config.widths)
    clones = [e.input_shapes[0] for e in profile.events() if e.name == "aten::clone"]
    assert any(e.name == "aten::conv2d" for e in profile.events()), "the profiler saw nothing"
    assert not [shape for shape in clones if torch.Size(shape).numel() > small]


def test_double_and_bfloat16():
    unet = build("iddpm_cifar10")
    x_t, t = inputs(unet)
    exact = copy.deepcopy(unet).double()(x_t.double(), t)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(unet(x_t, t).double(), exact, **FLOAT32)
    low = copy.deepcopy(unet).bfloat16()(x_t.bfloat16(), t)
    assert low.dtype == torch.bfloat16
    # 2^-9 per rounding, ~100 roundings in sequence that add up like a random walk.
    assert (low.double() - exact).norm() <= 2**-9 * 100**0.5 * 2 * exact.norm()


def test_autocast_to_bfloat16():
    unet = build("ddpm_cifar10")
    x_t, t = inputs(unet)
    exact = unet(x_t, t)
    with torch.autocast("cpu", torch.bfloat16):
        low = unet(x_t, t)
    assert (low - exact).norm() <= 2**-9 * 100**0.5 * 2 * exact.norm()


def test_fractional_and_int32_timesteps():
    unet = build("ddpm_cifar10")
    x_t, t = inputs(unet)
    y = unet(x_t, t)
    assert torch.equal(unet(x_t, t.int()), y)
    assert torch.equal(unet(x_t, t.double()), y)
    assert not torch.equal(unet(x_t, t + 0.5), y)


def test_state_dict_deepcopy_and_config_round_trip():
    unet = build("iddpm_cifar10", num_classes=3)
    arguments = inputs(unet)
    y = unet(*arguments)
    assert torch.equal(copy.deepcopy(unet)(*arguments), y)
    fields = json.loads(json.dumps(unet.config.to_dict()))
    again = UNet.from_config(fields).eval()
    assert again.config == unet.config
    again.load_state_dict(unet.state_dict())
    assert torch.equal(again(*arguments), y)


def test_compiles_without_a_graph_break():
    # Tracing is what may fail here, and takes seconds per level: the smallest network will do.
    unet = build("digits", num_classes=3, time_conditioning="scale_shift")
    unet.to(memory_format=torch.channels_last)
    x_t, t, y = inputs(unet)
    x_t = x_t.repeat(1, 1, 2, 2).to(memory_format=torch.channels_last)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        output = compiled(x_t, t, y)
        torch.testing.assert_close(output, unet(x_t, t, y), **FLOAT32)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_other_image_sizes_that_are_multiples():
    unet = build("mnist")
    x_t = torch.randn(2, 1, 12, 20)
    assert unet(x_t, torch.tensor([3, 4])).shape == x_t.shape


def test_average_resampling():
    unet = build("ddpm_cifar10", conv_resample=False)
    assert not any("sampler" in key for key in unet.state_dict())
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    down = unet.down_blocks[0].downsamplers[0](x)
    assert torch.equal(down, torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    up = unet.up_blocks[0].upsamplers[0](down)
    assert torch.equal(up[0, 0, :2], torch.tensor([[2.5, 2.5, 4.5, 4.5]] * 2))


def test_presets_that_do_not_need_a_gpu():
    for name, size in (("digits", 8), ("mnist", 28)):
        config = PRESETS[name]
        assert (config.sample_size, config.in_channels) == (size, 1)
    assert PRESETS["mnist"].resolutions == (28, 14, 7)


IMAGES, TIMES = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
CLASSES = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    [
        ({}, (torch.zeros(2, 3, 8, 8), TIMES), ValueError, r"x_t must .*\(B, 1, H, W\), got"),
        ({}, (torch.zeros(1, 8, 8), TIMES), ValueError, "x_t must have shape"),
        ({}, (torch.zeros(2, 1, 8, 7), TIMES), ValueError, r"multiples of \d+ .*got 8 x 7"),
        ({}, (IMAGES, TIMES[:1]), ValueError, r"t must have shape \(B,\) = \(2,\).*got \(1,\)"),
        ({}, (IMAGES, torch.tensor(3)), ValueError, r"t must have shape .*got \(\)"),
        ({}, (IMAGES, TIMES.bool()), TypeError, "t must be int64, .* got torch.bool"),
        ({}, (IMAGES, TIMES, CLASSES), ValueError, "no classes; set num_classes"),
        ({"num_classes": 3}, (IMAGES, TIMES), ValueError, "y is required: .* 3 classes"),
        ({"num_classes": 3}, (IMAGES, TIMES, CLASSES[:1]), ValueError, "y must have shape"),
        ({"num_classes": 3}, (IMAGES, TIMES, CLASSES.float()), TypeError, "y must be int64"),
        ({"num_classes": 3}, (IMAGES, TIMES, CLASSES + 2), ValueError, r"0 \.\. 2, .* 2 \.\. 3"),
        ({"num_classes": 3}, (IMAGES, TIMES, CLASSES - 1), ValueError, r"values in -1 \.\. 0"),
        (
            {"num_classes": 3, "null_class": True},
            (IMAGES, TIMES, CLASSES + 3),
            ValueError,
            r"0 \.\. 2, or 3 for no class, got values in 3 \.\. 4",
        ),
    ],
)
def test_bad_input_says_what_was_expected(changes, arguments, error, message):
    with pytest.raises(error, match=message):
        build("digits", **changes)(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": ()}, "channel_mult must be"),
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"sample_size": 30}, "sample_size must be a multiple of 8 for 4 levels, got 30"),
        ({"attention_resolutions": (5,)}, r"\(32, 16, 8, 4\), got \(5,\)"),
        ({"num_groups": 48}, "num_groups must divide the width of every level"),
        ({"num_heads": 3}, "num_heads must divide"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"null_class": True}, "null_class needs num_classes"),
        ({"time_embedding": "fourier"}, "time_embedding must be one of ddpm, openai"),
        ({"time_conditioning": "film"}, "must be one of additive, scale_shift"),
        ({"downsample_padding": "left"}, "must be one of right, both"),
        ({"width": 3}, "unknown U-Net setting width; the settings are sample_size, in_channels"),
    ],
)
def test_bad_settings_say_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet.from_preset("ddpm_cifar10", **changes)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'ddpm'; the presets are ddpm_cifar10, ddpm_256, "):
        UNet.from_preset("ddpm")


def test_config_of_the_wrong_type():
    with pytest.raises(TypeError, match="config must be a UNetConfig, got dict"):
        UNet({"sample_size": 8})
    with pytest.raises(ValueError, match="sample_size is missing"):
        UNetConfig.from_dict({})


def test_normalizations_are_the_fused_module():
    kinds = {type(m) for m in UNet(SMALL["digits"]).modules()}
    assert GroupNormSiLU in kinds
    assert not kinds & {torch.nn.GroupNorm, torch.nn.SiLU}
