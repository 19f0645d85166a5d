"""What `patch` must not break: hooks, shared modules, FSDP, quantized and odd normalizations."""

import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.utils.parametrize
from torch import nn

pytest.importorskip("diffusers")

from integrations.networks import make
from integrations.openai_unet import GroupNorm32, ResBlock
from nn.networks import build, unzero

import fastdiff
from fastdiff import _backends
from fastdiff.integrations import recognition


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
    """The activation also runs without the normalization."""

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
        (Branch, {"norm": "group_norm + silu"}),
        (Twice, {"norm": "group_norm + silu", "norm2": "group_norm + silu"}),
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
    assert report.replaced["a.norm"] == "group_norm + silu"  # its activation has another user
    for key, y in before.items():
        torch.testing.assert_close(shared[key](x), y)


def test_an_activation_of_its_own_is_known_before_the_block_around_it(monkeypatch):
    """improved-diffusion's SiLU, in a block by itself and patched for the first time."""
    monkeypatch.setattr(recognition, "SILU_CLASSES", {nn.SiLU: nn.SiLU.forward})
    block = unzero(ResBlock(4, 8, 4, 2, False)).eval()
    report = fastdiff.patch(block)
    assert report.replaced["out_layers.0"] == "channel_bias + group_norm + silu"
    assert fastdiff.patch(block) == report


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


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("patch_first", [True, False])
def test_parametrized_weights(patch_first):
    """They are no longer where parameters are kept."""
    block = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    x = torch.randn(2, 4, 3, 3)
    expected = nn.functional.silu(nn.functional.group_norm(x, 2, torch.full((4,), 2.0)))
    if patch_first:
        fastdiff.patch(block)
    nn.utils.parametrize.register_parametrization(block[0], "weight", Doubled())
    if not patch_first:
        assert fastdiff.patch(block).replaced == {"0": "group_norm + silu"}
    torch.testing.assert_close(block(x), expected)


HOOKS = {
    "forward": lambda m, note: m.register_forward_hook(lambda *_: note()),
    "forward_pre": lambda m, note: m.register_forward_pre_hook(lambda *_: note()),
    "full_backward": lambda m, note: m.register_full_backward_hook(lambda *_: note()),
    "full_backward_pre": lambda m, note: m.register_full_backward_pre_hook(lambda *_: note()),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("owner", ["Sequential", "Block", "ResBlock"])
def test_every_kind_of_hook_fires(owner, kind):
    """On each normalization and activation of a patched block, as often as before patching."""
    block = {
        "Sequential": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()),
        "Block": Block,
        "ResBlock": lambda: ResBlock(4, 8, 4, 2, True, silu=nn.SiLU),
    }[owner]()
    block = unzero(block).eval()
    x, emb = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    watched = [m for m in block.modules() if isinstance(m, (nn.GroupNorm, nn.SiLU))]
    results = []
    for patched in (False, True):
        if patched:
            fastdiff.patch(block)
        for m in watched:
            calls = []
            handle = HOOKS[kind](m, lambda calls=calls: calls.append(None))
            y = block(x, emb) if owner == "ResBlock" else block(x)
            y.square().sum().backward()
            handle.remove()
            results.append((len(calls), y))
    for (count, before), (count_after, after) in zip(
        results[: len(watched)], results[len(watched) :], strict=True
    ):
        assert count_after == count == 1
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_global_hooks_fire():
    block = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    fastdiff.patch(block)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: seen.append(type(m).__name__)
    )
    block(torch.randn(1, 4, 2, 2))
    handle.remove()
    assert seen == ["GroupNorm", "SiLU", "Sequential"]


class Doubling(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Packed(torch.Tensor):
    """As torchao's quantized weights are: not what it looks like."""


def test_what_is_left_and_why():
    scripted = torch.jit.script(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
    exact = nn.GroupNorm(2, 4, eps=0.0)
    odd = nn.GroupNorm(2, 4)
    odd.forward = lambda x: x
    prepared = nn.GroupNorm(2, 4)
    prepared.qconfig = None
    packed = nn.GroupNorm(2, 4)
    packed.weight = nn.Parameter(packed.weight.detach().as_subclass(Packed))
    model = nn.ModuleDict(
        {
            "doubling": Doubling(2, 4),
            "scripted": scripted,
            "exact": exact,
            "odd": odd,
            "prepared": prepared,
            "packed": packed,
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
        "packed": "its parameters are not plain tensors",
        "own": "already fused",
        "quantized": "quantized",
    }
    assert report.left.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.left[name]
        assert f"x: {report.left[name]}" in str(report)
    assert torch.equal(odd(torch.ones(1, 4, 2)), torch.ones(1, 4, 2))
    with pytest.raises(TypeError, match=r"patch: module is dict, expected an nn\.Module"):
        fastdiff.patch({})


def test_where_patch_is_called_does_not_matter(monkeypatch):
    """Autocast, and a backend that does not run on the CPU, are for the network's own calls."""
    monkeypatch.setattr(recognition, "_verdicts", {})
    monkeypatch.setattr(_backends, "_environment", "cuda")
    model, run, x = make("guided-diffusion")
    expected = run(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        report = fastdiff.patch(model)
    assert "group_norm + scale_shift + silu" in report.replaced.values()
    assert set(recognition._verdicts.values()) == {None}
    monkeypatch.setattr(_backends, "_environment", None)
    torch.testing.assert_close(run(model, x), expected, rtol=1e-5, atol=1e-5)


def test_our_own_unet_is_left_alone():
    unet = build("digits")
    report = fastdiff.patch(unet)
    assert not report.replaced
    assert set(report.left.values()) == {"fastdiff's own, already fused"}


def test_a_dynamically_quantized_network():
    """Its linear layers are; the normalizations are float, and fused."""
    torch.manual_seed(0)
    block = unzero(ResBlock(4, 8, 4, 2, True, silu=nn.SiLU)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        block = torch.ao.quantization.quantize_dynamic(block, {nn.Linear}, torch.qint8)
    assert "quantized" in type(block.emb_layers[1]).__module__
    x, emb = torch.randn(2, 4, 3, 3), torch.randn(2, 8)
    expected = block(x, emb)
    assert len(fastdiff.patch(block).replaced) == 2
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-5, atol=1e-5)


def test_fsdp_is_left_alone(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

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
        with pytest.raises(RuntimeError, match="has become a FSDPBlock"):
            fastdiff.unpatch(model)
        # The older wrapper, under which parameters are views of one flat tensor.
        wrapped = FullyShardedDataParallel(unzero(Block()), device_id=torch.device("cpu"))
        report = fastdiff.patch(wrapped)
        assert not report.replaced
        assert all("under FSDP" in reason for reason in report.left.values())
        torch.testing.assert_close(wrapped(x), expected)
        ddp = nn.parallel.DistributedDataParallel(unzero(Block()))
        expected = ddp(x)
        assert fastdiff.patch(ddp).replaced == {"module.norm": "group_norm + silu"}
        torch.testing.assert_close(ddp(x), expected)
        ddp(x).sum().backward()
    finally:
        dist.destroy_process_group()
