"""torch's own operators give on the device what they give on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed._symmetric_memory
from torch import nn
from torch.nn import functional

from software_cuda import device

pytestmark = pytest.mark.gpu


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_network_and_its_gradients(dtype, memory_format):
    x = torch.randn(2, 3, 8, 8).to(memory_format=memory_format)
    found = []
    for place in ("cpu", "cuda"):
        model = network().to(place, dtype, memory_format=memory_format)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(x.to(place, dtype)).float().square().mean().backward()
        optimizer.step()
        found.append([p.detach().float().cpu() for p in model.parameters()])
        found[-1] += [p.grad.float().cpu() for p in model.parameters()]
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.t().contiguous() + x.diagonal().sum(),
        lambda x: torch.topk(x, 2, dim=1).indices,
        lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None]),
        lambda x: torch.stack([x, x]).permute(2, 0, 1).clone(),
        lambda x: torch.cumsum(x, 0, out=torch.empty(0, device=x.device)),
        lambda x: functional.interpolate(x[None, None], scale_factor=2, mode="nearest"),
        lambda x: torch.linalg.eigvalsh(x @ x.t()),
        lambda x: torch.complex(x, x).abs(),
        lambda x: torch._foreach_add([x, x], 1.0)[1],
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_operators(function, lazy):
    x = torch.linspace(-1, 1, 36).view(6, 6)
    with device.lazy(lazy):
        found = function(x.cuda())
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), function(x))


def test_tensors_of_two_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda") + torch.ones(3)
    assert (torch.ones(3, device="cuda") * torch.tensor(2.0)).tolist() == [2] * 3


def test_new_memory_is_filled_for_deterministic_algorithms():
    """By an operator that runs on the device itself; the op tests look for NaN in results."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(5, device="cuda").isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def _by_jiterator(x: torch.Tensor) -> None:
    torch.cuda.jiterator._create_jit_fn("template <typename T> T f(T x) { return x + x; }")(x)


def _by_nvrtc(x: torch.Tensor) -> None:
    torch.cuda._compile_kernel("__global__ void f(float* x) { x[0] = 1; }", "f")


@pytest.mark.parametrize("compiled", [_by_jiterator, _by_nvrtc])
def test_what_nvrtc_has_compiled_is_refused(compiled):
    """Its machine code has no PTX beside it."""
    with device.expect("kernel fault") as reports, pytest.raises(RuntimeError, match="CUDA"):
        compiled(torch.ones(3, device="cuda"))
    assert "NVRTC" in reports[0].what


def test_symmetric_memory_is_refused():
    with pytest.raises(NotImplementedError, match="symmetric memory"):
        torch.distributed._symmetric_memory.empty(3, device="cuda")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_not_fused():
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()))
    x = torch.linspace(-1, 1, 5, device="cuda")
    for _ in range(4):  # from the third on it would compile a kernel
        torch.testing.assert_close(scripted(x), x.relu().tanh())
