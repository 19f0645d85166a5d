"""`patch` changes nothing but the kernels that run: outputs, gradients, names, copies."""

import copy
import io
import pickle

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from integrations.networks import NETWORKS, gradients, make, norms  # noqa: E402
from integrations.openai_unet import ResBlock  # noqa: E402
from nn.networks import SMALL, unzero  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.integrations import fused_modules  # noqa: E402
from fastdiff.nn import PRESETS  # noqa: E402
from fastdiff.nn.diffusers_format import unet2d_config  # noqa: E402


def block_of(name: str) -> str:
    """The residual block that a parameter belongs to: "input_blocks.1" of "input_blocks.1.0..."."""
    return ".".join(name.split(".")[:2])


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
    # A sum that cancels, such as the gradient of a bias in front of a normalization, carries the
    # rounding of its terms: errors are relative to the largest gradient of the block around it.
    largest: dict[str, torch.Tensor] = {}
    for key, gradient in grads_before.items():
        block = block_of(key)
        largest[block] = torch.maximum(largest.get(block, x.new_zeros(())), gradient.abs().max())
    for key, gradient in grads_before.items():
        error = (grads_after[key] - gradient).abs().max()
        assert error <= 1e-5 * largest[block_of(key)], key
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


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("patch_first", [True, False])
def test_torch_compile(patch_first):
    model = unzero(diffusers.UNet2DModel(**unet2d_config(SMALL["digits"]))).eval()
    x = torch.randn(2, 1, 8, 8)

    def run(model, x):
        return model(x, torch.tensor([3, 70])).sample

    expected = run(model, x)
    num = len(norms(model))
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
        assert len(fastdiff.patch(compiled).replaced) == num
        torch.testing.assert_close(run(compiled, x), expected, rtol=1e-4, atol=1e-5)
    assert captured[-1].count("fastdiff.group_norm_silu") == num
