"""Patched networks and fastdiff.UNet in torch.fx, TorchScript, torch.export, ONNX and DTensor."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from integrations.openai_unet import ResBlock
from nn.networks import build, unzero

import fastdiff


class Net(nn.Module):
    """What scripts, and has a Sequential, a pair of attributes and a normalization alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.layers = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1))
        self.norm, self.act, self.last = nn.GroupNorm(4, 8), nn.SiLU(), nn.GroupNorm(1, 8)

    def forward(self, x):
        h = self.layers(self.conv(x))
        h = self.norm(h)
        h = self.act(h)
        return self.last(h)


def patched(model, *arguments):
    model = unzero(model).eval()
    with torch.no_grad():
        expected = model(*arguments)
    assert not fastdiff.patch(model).left
    return model, arguments, expected


CASES = {
    "attributes": lambda: patched(Net(), torch.randn(2, 3, 8, 8)),
    "channels_last": lambda: patched(
        Net().to(memory_format=torch.channels_last),
        torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),
    ),
    "ResBlock": lambda: patched(
        ResBlock(4, 8, 6, 2, True, silu=nn.SiLU), torch.randn(2, 4, 6, 6), torch.randn(2, 8)
    ),
    "UNet": lambda: own_unet("digits"),
    "UNet with classes": lambda: own_unet("digits", torch.tensor([1, 2]), num_classes=3),
    "UNet, additive": lambda: own_unet("ddpm_cifar10", channels=3, size=16),
}


def own_unet(name, *more, channels=1, size=8, **changes):
    unet = unzero(build(name, **changes)).eval()
    arguments = torch.randn(2, channels, size, size), torch.tensor([3, 70]), *more
    with torch.no_grad():
        return unet, arguments, unet(*arguments)


def close(actual, expected, rtol=1e-5):
    """Two orders of the same sums: within their rounding, against the largest value."""
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both jit functions and the older exporter are deprecated
        yield


@pytest.mark.parametrize("case", CASES)
def test_fx(case):
    model, arguments, expected = CASES[case]()
    if case == "ResBlock":
        pytest.skip("its forward branches on shapes: fx cannot trace it unpatched either")
    graph = torch.fx.symbolic_trace(model)
    close(graph(*arguments), expected)
    close(pickle.loads(pickle.dumps(graph))(*arguments), expected)
    larger = [torch.cat([a, a]) for a in arguments]  # no shape is in it
    close(graph(*larger), torch.cat([expected, expected]))


def test_fx_keeps_names_and_the_pass_fuses_them():
    model, (x,), expected = CASES["attributes"]()
    graph = torch.fx.symbolic_trace(model)
    names = [n.name for n in torch.fx.symbolic_trace(Net()).graph.nodes]
    assert [n.name for n in graph.graph.nodes] == names
    assert "norm" in names  # so extractors find the features between the two
    fastdiff.compile_pass(graph)
    assert graph.meta["fastdiff"] == 3
    close(graph(x), expected)


def test_quantization_prepares_a_patched_network():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, arguments, expected = CASES["attributes"]()
    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), arguments)
    close(prepared(*arguments), expected)
    # 8 bits in three layers behind each other, each rounded to 1/255 of its range.
    close(convert_fx(prepared)(*arguments), expected, 0.2)


@pytest.mark.parametrize("case", CASES)
def test_jit_trace(case):
    model, arguments, expected = CASES[case]()
    traced = torch.jit.trace(model, arguments)
    assert "fastdiff::" not in str(traced.inlined_graph)  # so it runs where fastdiff is not
    close(traced(*arguments), expected)


def test_jit_script():
    model, (x,), expected = CASES["attributes"]()
    children = list(model.modules())
    scripted = torch.jit.script(model)
    close(scripted(x), expected)
    assert list(model.modules()) == children
    assert isinstance(model.norm, nn.GroupNorm)
    unet, _, _ = CASES["UNet"]()
    with pytest.raises(RuntimeError, match=r"use torch\.jit\.trace or torch\.export.*unpatch"):
        torch.jit.script(unet)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, arguments, expected = CASES["attributes"]()
    program = torch.export.export(model, arguments, strict=strict)
    targets = [str(n.target) for n in program.graph.nodes]
    assert targets.count("fastdiff.group_norm_silu.default") == 3
    close(program.module()(*arguments), expected)
    assert "fastdiff" in str(program.run_decompositions().graph)  # torch's table leaves it whole


def test_a_dynamic_batch_asks_the_fake_for_shapes():
    """Not the decomposition that ONNX uses, which FakeTensor would prefer for symbolic sizes."""
    model, (x,), _ = CASES["channels_last"]()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    ops = [n for n in program.graph.nodes if "group_norm_silu" in str(n.target)]
    assert len(ops) == 3
    values = [n.meta["val"][0] for n in ops]
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in values)
    y = torch.randn(5, 3, 8, 8)
    close(program.module()(y), model(y))


def run_onnx(path, arguments):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = {n: np.asarray(a) for n, a in zip(names, arguments, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("case", CASES)
def test_onnx_from_a_trace(case, tmp_path):
    pytest.importorskip("onnx")
    model, arguments, expected = CASES[case]()
    path = str(tmp_path / "net.onnx")
    torch.onnx.export(model, arguments, path, dynamo=False)
    close(run_onnx(path, arguments), expected)


def export_onnx(case, tmp_path):
    """By way of torch.export, once for a module and once for its program."""
    pytest.importorskip("onnxscript")
    model, arguments, expected = CASES[case]()
    path = str(tmp_path / "net.onnx")
    shapes = tuple({0: torch.export.Dim("batch")} for _ in arguments)
    torch.onnx.export(model, arguments, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    close(run_onnx(path, arguments), expected)
    larger = [torch.cat([a, a, a]) for a in arguments]
    close(run_onnx(path, larger), torch.cat([expected] * 3))
    program = torch.export.export(model, arguments)
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    close(run_onnx(path, arguments), expected)


def test_onnx_from_an_export(tmp_path):
    export_onnx("attributes", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c != "attributes"])
def test_onnx_from_an_export_of_more_networks(case, tmp_path):
    export_onnx(case, tmp_path)


# Of the U-Net's operators torch works out the sharding one by one, which takes a minute.
@pytest.mark.parametrize(
    "case", ["attributes", "ResBlock", pytest.param("UNet", marks=pytest.mark.slow)]
)
def test_dtensor(case, tmp_path):
    """Torch's own operators run, which know how to shard."""
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    model, arguments, expected = CASES[case]()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = distribute_module(copy.deepcopy(model), mesh)
        for placement in (Replicate(), Shard(0)):
            sharded = [distribute_tensor(a, mesh, [placement]) for a in arguments]
            with torch.no_grad():
                close(model(*sharded).full_tensor(), expected)
        if case == "attributes":  # torch lacks a rule for the gradient of attention on the CPU
            model(*sharded).to_local().square().sum().backward()
            plain, arguments, _ = CASES[case]()
            plain.load_state_dict({k: v.full_tensor() for k, v in model.state_dict().items()})
            plain(sharded[0].full_tensor()).square().sum().backward()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                close(ours.grad.full_tensor(), theirs.grad)
    finally:
        dist.destroy_process_group()
