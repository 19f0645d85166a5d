"""`patch` changes nothing but the kernels that run: outputs, gradients, names, hooks, classes."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from integrations.openai_unet import GroupNorm32, ResBlock, SiLU, UNetModel
from nn.networks import SMALL, build, unzero
from torch import nn

import fastdiff
from fastdiff.integrations import fused_modules
from fastdiff.nn import PRESETS
from fastdiff.nn.diffusers_format import unet2d_config

diffusers = pytest.importorskip("diffusers")


def ddpm_cifar(**changes):
    """UNet2DModel as DDPM uses it for CIFAR-10, with narrow layers."""
    config = unet2d_config(SMALL["ddpm_cifar10"].replace(**changes))
    return diffusers.UNet2DModel(**config), lambda m, x: m(x, torch.tensor([3, 70])).sample, 3


def iddpm_cifar():
    config = unet2d_config(SMALL["iddpm_cifar10"])
    return diffusers.UNet2DModel(**config), lambda m, x: m(x, torch.tensor([3, 70])).sample, 3


def small_sd():
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5))
    return model, lambda m, x: m(x, torch.tensor([3, 70]), text.to(x.dtype)).sample, 4


def vae():
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return model, lambda m, x: m(x).sample, 3


def guided(silu=nn.SiLU, name="iddpm_cifar10"):
    config = SMALL[name].replace(num_classes=None)
    return UNetModel(config, silu), lambda m, x: m(x, torch.tensor([3, 70])), 3


NETWORKS = {
    "UNet2DModel": ddpm_cifar,
    "UNet2DModel-scale_shift": iddpm_cifar,
    "UNet2DConditionModel": small_sd,
    "AutoencoderKL": vae,
    "guided-diffusion": guided,
    "improved-diffusion": lambda: guided(SiLU),
    "guided-additive": lambda: guided(name="ddpm_cifar10"),
}


def make(name):
    torch.manual_seed(0)
    model, run, channels = NETWORKS[name]()
    unzero(model)
    x = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    return model.eval(), run, x


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.GroupNorm)]


def gradients(model, run, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(model, x)
    y.float().square().mean().backward()
    named = dict(model.named_parameters())
    # Softmax does not see the keys' bias: its gradient is 0, and what is computed is rounding.
    grads = {n: p.grad for n, p in named.items() if p.grad is not None and "to_k.bias" not in n}
    return y.detach(), {"x": x.grad, **grads}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_outputs_and_gradients(name, memory_format):
    model, run, x = make(name)
    model, x = model.to(memory_format=memory_format), x.to(memory_format=memory_format)
    keys = list(model.state_dict())
    before, grads_before = gradients(model, run, x)
    report = fastdiff.patch(model)
    assert len(report.replaced) == len(norms(model)) > 0
    assert not report.left
    after, grads_after = gradients(model, run, x)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert grads_after.keys() == grads_before.keys()
    for key, gradient in grads_before.items():
        error = (grads_after[key] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), key
    assert list(model.state_dict()) == keys
    assert fastdiff.patch(model) == report
    fastdiff.unpatch(model)
    assert not any(isinstance(m, fused_modules.Fused) for m in model.modules())
    assert torch.equal(run(model, x), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_fused_with_what(name):
    model, _, _ = make(name)
    replaced = fastdiff.patch(model).replaced
    alone = [n for n, what in replaced.items() if what == "group_norm"]
    # Attention normalizes without an activation; everything else has SiLU behind it.
    assert alone == [n for n in alone if "attention" in n or n.split(".")[-1] == "norm"]
    times = [n for n, what in replaced.items() if "channel_bias" in what or "scale_shift" in what]
    seconds = [n for n in replaced if n.endswith(("norm2", "out_layers.0"))]
    assert times == ([] if name == "AutoencoderKL" else seconds)
    assert len(alone) + len(times) < len(replaced)


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"])
def test_bfloat16_within_eagers_own_error(name):
    def error(value, truth):
        return ((value.double() - truth).square().sum() / truth.square().sum()).sqrt()

    model, run, x = make(name)
    ratios = []
    for seed in range(4):
        unzero(model, seed)
        exact, exact_grads = gradients(copy.deepcopy(model).double(), run, x.double())
        half = copy.deepcopy(model).bfloat16()
        errors = []
        for _ in ("eager", "fused"):
            y, grads = gradients(half, run, x.bfloat16())
            assert y.dtype == torch.bfloat16
            both = [torch.cat([g[key].flatten() for key in grads]) for g in (grads, exact_grads)]
            errors.append([error(y, exact), error(*both)])
            fastdiff.patch(half)
        ratios.append([(fused / eager).log() for eager, fused in zip(*errors, strict=True)])
    output, gradient = torch.tensor(ratios).mean(0).exp()
    assert output <= 1
    # Two draws of rounding noise: the logarithm of their ratio scatters by 0.2 from seed to seed,
    # by 0.1 in the mean of four; two standard deviations.
    assert gradient <= 1.2


def test_full_size_ddpm_cifar():
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**unet2d_config(PRESETS["ddpm_cifar10"]))
    report = fastdiff.patch(model)
    assert len(report.replaced) == len(norms(model)) == 51
    fused_with_silu = [what for what in report.replaced.values() if what.endswith("silu")]
    assert len(fused_with_silu) == 45  # 22 residual blocks and the output; 6 attentions have none


def test_copies_conversions_and_pickles():
    model, run, x = make("UNet2DModel")
    before = run(model, x)
    fastdiff.patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(other, x), before, rtol=1e-5, atol=1e-5)
        fastdiff.unpatch(other)
        assert torch.equal(run(other, x), before)
    assert [type(m) for m in model.modules() if isinstance(m, fused_modules.PairedActivation)]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh, _, _ = make("UNet2DModel")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    wide = copy.deepcopy(model).double().to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(wide, x.double()).float(), before, rtol=1e-4, atol=1e-5)
    half = run(model.half(), x.half())
    assert half.dtype == torch.half
    torch.testing.assert_close(half.float(), before, rtol=0.02, atol=0.02)


class Block(nn.Module):
    """A home-grown block with its activation as a module of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        h = self.norm(x)
        h = self.act(h)
        return self.conv(h)


class Nested(Block):
    def forward(self, x):
        return self.conv(self.act(self.norm(x)))


class Branch(Block):
    """The activation also runs without the normalization: the two are no pair."""

    def forward(self, x):
        h = x
        if x.shape[0] > 2:
            h = self.norm(h)
        h = self.act(h)
        return self.conv(h)


class Twice(Block):
    """One activation for two normalizations."""

    def __init__(self):
        super().__init__()
        self.norm2 = nn.GroupNorm(4, 4)

    def forward(self, x):
        h = self.norm(x)
        h = self.act(h)
        h = self.conv(h)
        h = self.norm2(h)
        return self.act(h)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Block, {"norm": "group_norm + silu"}),
        (Nested, {"norm": "group_norm + silu"}),
        (Branch, {"norm": "group_norm"}),
        (Twice, {"norm": "group_norm", "norm2": "group_norm"}),
    ],
)
def test_home_grown_modules(cls, expected):
    module = unzero(cls())
    images = [torch.randn(batch, 4, 3, 5) for batch in (1, 3)]
    before = [module(x) for x in images]
    assert fastdiff.patch(module).replaced == expected
    for x, y in zip(images, before, strict=True):
        torch.testing.assert_close(module(x), y)
    other = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())  # (N, C): torch's own code
    x = torch.randn(5, 4)
    y = other(x)
    fastdiff.patch(other)
    assert torch.equal(other(x), y)


def test_shared_modules():
    norm, block = nn.GroupNorm(2, 4), Block()
    shared = nn.ModuleDict(
        {
            "silu": nn.Sequential(norm, nn.SiLU()),
            "gelu": nn.Sequential(norm, nn.GELU()),
            "a": block,
            "b": nn.Sequential(OrderedDict(act=block.act)),
        }
    )
    x = torch.randn(2, 4, 3, 3)
    before = {k: m(x) for k, m in shared.items()}
    report = fastdiff.patch(shared)
    assert report.replaced["silu.0"] == "group_norm + silu"
    assert report.replaced["a.norm"] == "group_norm"  # its activation has another user
    for key, y in before.items():
        torch.testing.assert_close(shared[key](x), y)


@pytest.mark.parametrize("name", ["UNet2DModel", "guided-diffusion"])
def test_hooks_fire_and_see_the_same(name):
    """On every normalization and activation, set before patching and after it."""
    for before_patch in (True, False):
        model, run, x = make(name)
        watched = [
            m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.SiLU, nn.Sequential))
        ]

        def record(model=model, run=run, watched=watched, x=x):
            seen = []
            handles = [
                m.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
                for m in watched
            ]
            return seen, handles

        seen, handles = record()
        run(model, x)
        for handle in handles:
            handle.remove()
        if not before_patch:
            fastdiff.patch(model)
        seen_after, handles = record()
        if before_patch:
            report = fastdiff.patch(model)
            assert not report.replaced
            assert set(report.left.values()) == {"hooks or a forward of its own on the instance"}
        y = run(model, x)
        assert len(seen_after) == len(seen)
        for expected, actual in zip(seen, seen_after, strict=True):
            for a, b in zip(expected, actual, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(run(model, x), y, rtol=1e-4, atol=1e-5)


def test_global_hooks_fire():
    block = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    fastdiff.patch(block)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: seen.append(type(m).__name__)
    )
    block(torch.randn(1, 4, 2, 2))
    handle.remove()
    assert seen == ["FusedGroupNorm", "SiLU", "FusedSequential"]


class Doubling(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_left_and_why():
    scripted = torch.jit.script(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
    exact = nn.GroupNorm(2, 4, eps=0.0)
    odd = nn.GroupNorm(2, 4)
    odd.forward = lambda x: x
    prepared = nn.GroupNorm(2, 4)
    prepared.qconfig = None
    model = nn.ModuleDict(
        {
            "doubling": Doubling(2, 4),
            "scripted": scripted,
            "exact": exact,
            "odd": odd,
            "prepared": prepared,
            "own": fastdiff.nn.GroupNormSiLU(2, 4),
            "quantized": torch.ao.nn.quantized.GroupNorm(2, 4, None, None, 1.0, 0),
            "fine": GroupNorm32(2, 4),
        }
    )
    report = fastdiff.patch(model)
    assert report.replaced == {"fine": "group_norm"}
    reasons = {
        "doubling": "Doubling has a forward of its own",
        "scripted.0": "TorchScript",
        "exact": "eps = 0.0",
        "odd": "hooks or a forward of its own",
        "prepared": "quantized",
        "own": "already fused",
        "quantized": "quantized",
    }
    assert report.left.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.left[name]
        assert f"{name}: left, " in str(report)
    assert torch.equal(odd(torch.ones(1, 4, 2)), torch.ones(1, 4, 2))
    with pytest.raises(TypeError, match=r"patch: module is dict, expected an nn\.Module"):
        fastdiff.patch({})


def test_our_own_unet_is_left_alone():
    unet = build("digits")
    report = fastdiff.patch(unet)
    assert not report.replaced
    assert set(report.left.values()) == {"fastdiff's own, already fused"}


def test_fsdp_is_left_alone(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        x = torch.randn(2, 4, 3, 3)
        model = nn.Sequential(unzero(Block()), nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
        expected = model(x)
        fully_shard(model[0], mesh=mesh)
        report = fastdiff.patch(model)
        assert report.replaced == {"1.0": "group_norm + silu"}
        assert "under FSDP" in report.left["0.norm"]
        torch.testing.assert_close(model(x), expected)
        # Patched first, then sharded, down to the normalization itself.
        model = unzero(Block())
        expected = model(x)
        fastdiff.patch(model)
        fully_shard(model.norm, mesh=mesh)
        fully_shard(model, mesh=mesh)
        y = model(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="'norm' has become"):
            fastdiff.unpatch(model)
        ddp = nn.parallel.DistributedDataParallel(unzero(Block()))
        expected = ddp(x)
        assert fastdiff.patch(ddp).replaced == {"module.norm": "group_norm + silu"}
        torch.testing.assert_close(ddp(x), expected)
        ddp(x).sum().backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize(("up", "down"), [(True, False), (False, True)])
def test_resampling_blocks(up, down, scale_shift):
    torch.manual_seed(0)
    block = unzero(ResBlock(4, 8, 6, 2, scale_shift, up=up, down=down, use_checkpoint=True))
    resnet = diffusers.models.resnet.ResnetBlock2D(
        in_channels=4, out_channels=6, temb_channels=8, groups=2, up=up, down=down,
        time_embedding_norm="scale_shift" if scale_shift else "default", output_scale_factor=2.0,
    )  # fmt: skip
    x, emb = torch.randn(3, 4, 6, 6), torch.randn(3, 8)
    for module in (block.eval(), unzero(resnet).eval()):
        for time in (emb, emb[:1]) if module is resnet else (emb,):
            fastdiff.unpatch(module)
            expected = module(x, time)
            assert len(fastdiff.patch(module).replaced) == 2
            assert "group_norm" not in fastdiff.patch(module).replaced.values()
            torch.testing.assert_close(module(x, time), expected, rtol=1e-5, atol=1e-5)


class Reordered(ResBlock):
    """Looks like the ResBlock and computes something else."""

    def _forward(self, x, emb):
        return self.skip_connection(x) + self.out_layers(self.in_layers(x))


def test_a_look_alike_is_found_out():
    block = unzero(Reordered(4, 8, 4, 2, False)).eval()
    x, emb = torch.randn(2, 4, 3, 3), torch.randn(2, 8)
    expected = block(x, emb)
    report = fastdiff.patch(block)
    assert report.replaced["out_layers.0"] == "group_norm + silu"  # as its Sequential has it
    assert not isinstance(block, fused_modules.FusedResBlock)
    torch.testing.assert_close(block(x, emb), expected)


@pytest.mark.parametrize("patch_first", [True, False])
def test_torch_compile(patch_first):
    model, run, x = make("UNet2DModel")
    expected = run(model, x)
    captured = []

    def look(graph_module, example_inputs):
        captured.append(str(graph_module.graph))
        return graph_module.forward

    if patch_first:
        fastdiff.patch(model)
    compiled = torch.compile(model, backend=look, fullgraph=True)
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-4, atol=1e-5)
    if not patch_first:  # compiled once more, as the modules are others now
        assert captured[-1].count("fastdiff.group_norm_silu") == 0
        assert len(fastdiff.patch(compiled).replaced) == 51
        torch.testing.assert_close(run(compiled, x), expected, rtol=1e-4, atol=1e-5)
    assert captured[-1].count("fastdiff.group_norm_silu") == 51
