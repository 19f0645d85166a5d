"""Training on a device: autocast with GradScaler, torch.compile, a network of real size."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu.needs import GPU
from gpu.test_cuda_graphs import network, trainer
from torch import Tensor, nn

import fastdiff
from fastdiff import GaussianDiffusion, NoiseSchedule, ops
from fastdiff.nn import UNet, UNetConfig

pytestmark = GPU

UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def awake(unet: nn.Module) -> nn.Module:
    """Layers that start at zero get weights, or what precedes them would get no gradient."""
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.xavier_uniform_(parameter)
    return unet


def loss_and_gradients(unet: nn.Module, x0: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of L_simple with noise from seeds; the gradient of all parameters as one float64 tensor."""
    unet.zero_grad(set_to_none=True)
    t = torch.linspace(0, 999, len(x0), device=x0.device).long()
    diffusion = GaussianDiffusion(NoiseSchedule.linear(1000))
    loss = diffusion.training_losses(unet, x0, t, seed=0)["loss"].mean()
    (scale * loss).backward()
    gradient = torch.cat([p.grad.double().flatten() for p in unet.parameters()]) / scale
    return loss.detach().double().cpu(), gradient.cpu()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# Triton compiles some fifty kernels for a network.
SLOW_TRITON = ["cuda", pytest.param("triton", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", SLOW_TRITON, indirect=True)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_autocast_with_a_gradient_scaler(dtype: torch.dtype, backend: str) -> None:
    """Scaled, unscaled, and stepped as users write it; an overflow leaves the weights alone."""
    unet = network("cuda")
    x0 = torch.linspace(-1, 1, 4 * 64, device="cuda").view(4, 1, 8, 8)
    _, exact = loss_and_gradients(copy.deepcopy(unet).double(), x0.double())
    optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with fastdiff.use_backend(backend):
        with torch.autocast("cuda", dtype):
            t = torch.linspace(0, 999, 4, device="cuda").long()
            diffusion = GaussianDiffusion(NoiseSchedule.linear(1000))
            loss = diffusion.training_losses(unet, x0, t, seed=0)["loss"].mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradient = torch.cat([p.grad.double().flatten() for p in unet.parameters()]).cpu()
        # Rounding errors of the layers' outputs, about twenty of them in a row, of random signs.
        assert relative(gradient, exact) < 10 * UNIT[dtype]
        before = [p.detach().clone() for p in unet.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(p, b) for p, b in zip(unet.parameters(), before, strict=True))
        assert scaler.get_scale() == 2.0**10
        before = [p.detach().clone() for p in unet.parameters()]
        next(unet.parameters()).grad.fill_(torch.inf)
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss.new_tensor(torch.inf) * next(unet.parameters()).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, b) for p, b in zip(unet.parameters(), before, strict=True))


# CIFAR-10's size, with attention, dropout off and few channels.
REAL_SIZE = UNetConfig(
    sample_size=32,
    in_channels=3,
    channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(16,),
    num_groups=32,
    dropout=0.0,
)


@pytest.mark.parametrize("backend", SLOW_TRITON, indirect=True)
def test_a_network_of_32x32_in_bfloat16_and_channels_last(backend: str) -> None:
    """Against the same network in float32 with plain PyTorch: no worse than plain PyTorch's own
    bfloat16."""
    torch.manual_seed(0)
    exact = awake(UNet(REAL_SIZE))
    x0 = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    results = {}
    for name in ("reference", backend):
        unet = copy.deepcopy(exact).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
        x = x0.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
        with fastdiff.use_backend(name):
            results[name] = loss_and_gradients(unet, x)
    with fastdiff.use_backend("reference"):
        expected_loss, expected = loss_and_gradients(exact, x0.bfloat16().float())
    errors = {key: relative(gradient, expected) for key, (_, gradient) in results.items()}
    print(f"errors of the gradient: {errors}")
    assert errors[backend] <= 1.25 * errors["reference"]
    assert float(results[backend][0]) == pytest.approx(float(expected_loss), rel=2.0**-6)


COMPILED = [
    pytest.param("default", id="default"),
    pytest.param("reduce-overhead", id="reduce-overhead"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMPILED)
def test_a_compiled_training_step(mode: str, backend: str) -> None:
    """torch.compile of loss and network, also into CUDA graphs: the losses of eager steps."""
    torch._dynamo.reset()
    losses = []
    with fastdiff.use_backend(backend):
        for compiled in (False, True):
            step, _ = trainer("cuda")
            if compiled:
                step = torch.compile(step, mode=mode)
            losses.append([step().item() for _ in range(5)])
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", COMPILED)
def test_a_compiled_graph_of_ops(mode: str, backend: str) -> None:
    """The ops alone in one graph, forward and backward, without torch's own kernels around them."""
    torch._dynamo.reset()
    tables = NoiseSchedule.linear(1000).tables(torch.device("cuda"))
    x0 = torch.linspace(-1, 1, 4 * 64, device="cuda").view(4, 1, 8, 8)
    t = torch.linspace(0, 999, 4, device="cuda").long()
    weight = torch.linspace(0.5, 1.5, 1, device="cuda").requires_grad_()

    def loss() -> Tensor:
        x_t = ops.q_sample(x0, t, tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar, seed=5)
        h = ops.group_norm_silu(x_t, 1, weight, None)
        return ops.eps_loss(h, seed=5)

    results = []
    with fastdiff.use_backend(backend):
        for function in (loss, torch.compile(loss, fullgraph=True, mode=mode)):
            for _ in range(3):  # reduce-overhead records a graph at the second call
                value = function()
                (gradient,) = torch.autograd.grad(value, weight)
            results.append((value.item(), gradient.item()))
    assert results[0] == pytest.approx(results[1], rel=1e-6)
