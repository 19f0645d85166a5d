"""What only a GPU can show: streams, devices, CUDA graphs, and the same bits in every run.

    pytest -m gpu        # with the op tests, which run their cases on the device too

The results themselves are compared with float64 by the op tests and `python -m fastdiff.verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.nn import UNet
from fastdiff.verification import CASES, Case
from fastdiff.verification.cases import Inputs

BACKENDS = ("cuda", "triton")
STEPS = 5
BATCH, SHAPE = 4, (1, 8, 8)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if (reason := fastdiff.backends()[request.param].reason) is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.variant}")


def results(case: Case, arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients on the present stream, without a synchronization."""
    given = dict(arguments)
    for name in case.differentiable:
        given[name] = given[name].detach().requires_grad_()
    returned = case.function(**given)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    found = [x.detach() for x in outputs]
    if case.differentiable:
        inputs = [given[name] for name in case.differentiable]
        found += torch.autograd.grad(outputs[0], inputs, torch.ones_like(outputs[0]))
    return found


def inputs(case: Case, device: str, layout: str = "nchw") -> dict[str, Any]:
    return case.arguments(Inputs(torch.float32, layout, torch.device(device)))


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@cases
def test_runs_on_the_current_stream(case: Case, backend: str) -> None:
    """Inputs that a side stream is still writing are waited for: the default stream would not."""
    arguments = inputs(case, "cuda")
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    late = arguments | {k: torch.zeros_like(v) for k, v in tensors.items()}
    with fastdiff.use_backend(backend):
        expected = results(case, arguments)
        results(case, late)  # compiles and loads what the side stream will need
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # clock cycles: a tenth of a second
            for name, tensor in tensors.items():
                late[name].copy_(tensor)
            actual = results(case, late)
            busy = not stream.query()
        stream.synchronize()
    assert busy, "the call waited for the device"
    assert_same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@cases
def test_runs_on_the_device_of_its_inputs(case: Case, backend: str) -> None:
    """While another device is the current one, which stays so."""
    with fastdiff.use_backend(backend):
        expected = results(case, inputs(case, "cuda:0"))
        with torch.cuda.device(0):
            actual = results(case, inputs(case, "cuda:1"))
            assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in actual)
    same_model = len({torch.cuda.get_device_name(i) for i in (0, 1)}) == 1
    if same_model:
        assert_same_bits(actual, expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_inputs_on_two_devices_are_refused(backend: str) -> None:
    (case,) = (c for c in CASES if (c.op, c.variant) == ("q_sample", "noise given"))
    arguments = inputs(case, "cuda:0")
    with (
        fastdiff.use_backend(backend),
        pytest.raises((ValueError, RuntimeError), match=r"noise|device"),
    ):
        case.function(**arguments | {"noise": arguments["noise"].to("cuda:1")})


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "vectors"])
@cases
def test_runs_repeat_bit_for_bit(case: Case, layout: str, backend: str) -> None:
    """Beside other work on the device too, which changes the order of the blocks."""
    arguments = inputs(case, "cuda", layout)
    with fastdiff.use_backend(backend):
        expected = results(case, arguments)
        load, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
        for _ in range(5):
            with torch.cuda.stream(other):
                load = load @ load / 2048
            assert_same_bits(results(case, arguments), expected)


def test_the_noise_is_that_of_the_cpu(backend: str) -> None:
    """Words are the same; a normal may differ by the functions' last bits."""
    with fastdiff.use_backend(backend):
        device = ops.philox_normal((3, 5, 17, 19), 11, device="cuda").cpu()
    torch.testing.assert_close(device, ops.philox_normal((3, 5, 17, 19), 11), rtol=1e-5, atol=1e-5)


def network(device: str) -> UNet:
    torch.manual_seed(0)
    unet = UNet.from_preset("digits").eval()  # no dropout: its state is not part of the graph
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.xavier_uniform_(parameter)
    return unet.to(device)


def sampler(device: str) -> tuple[Callable[[], Tensor], Tensor]:
    """A guided DDIM loop with noise, from a tensor that may be refilled."""
    unet, schedule = network(device).requires_grad_(False), fastdiff.NoiseSchedule.linear(1000)
    indices = torch.arange(0, 1000, 1000 // STEPS)
    table = schedule.ddim_table(indices, eta=1.0).to(device)
    rows = [torch.full((BATCH,), row, device=device) for row in range(STEPS)]
    times = [torch.full((BATCH,), int(index), device=device) for index in indices]
    keys = ops.sample_keys(3, BATCH, device=device)
    start = torch.zeros(BATCH, *SHAPE, device=device)

    def loop() -> Tensor:
        x = start
        for row in reversed(range(STEPS)):
            output = unet(x, times[row])
            x = ops.ddim_step(
                x,
                output,
                rows[row],
                table,
                uncond=0.5 * output,
                guidance_scale=2.0,
                seed=keys,
                stream=row,
            )
        return x

    return loop, start


def trainer(device: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """One step of gradient descent on L_simple, whose noise is made twice from its keys."""
    unet = network(device)
    tables = fastdiff.NoiseSchedule.linear(1000).tables(torch.device(device))
    x0 = torch.linspace(-1, 1, BATCH * 64, device=device).view(BATCH, *SHAPE)
    t = torch.linspace(0, 999, BATCH, device=device).long()
    keys = ops.sample_keys(5, BATCH, device=device)
    optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        x_t = ops.q_sample(x0, t, tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar, seed=keys)
        loss = ops.eps_loss(unet(x_t, t), seed=keys)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, list(unet.parameters())


def captured(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of a function that has run before, on a side stream as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.fixture
def deterministic_convolutions() -> Any:
    """What is compared bit for bit has to be so outside of fastdiff too."""
    flags = torch.backends.cudnn
    with flags.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.usefixtures("deterministic_convolutions")
def test_a_sampler_loop_can_be_captured(backend: str) -> None:
    loop, start = sampler("cuda")
    with fastdiff.use_backend(backend):
        graph, result = captured(loop)
        for seed in (1, 2):
            start.copy_(ops.philox_normal((BATCH, *SHAPE), seed, device="cuda"))
            graph.replay()
            replayed = result.clone()
            torch.testing.assert_close(replayed, loop(), rtol=1e-4, atol=1e-5)
            assert replayed.isfinite().all()
            assert replayed.std() > 0


@pytest.mark.usefixtures("deterministic_convolutions")
def test_a_training_step_can_be_captured(backend: str) -> None:
    """Replays train as the same number of eager steps from the same parameters does."""
    step, parameters = trainer("cuda")
    with fastdiff.use_backend(backend):
        graph, loss = captured(step)
        before = [p.detach().clone() for p in parameters]
        replayed = []
        for _ in range(STEPS):
            graph.replay()
            replayed.append(loss.item())
        after = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        eager = [step().item() for _ in range(STEPS)]
    assert replayed[-1] < replayed[0]
    torch.testing.assert_close(torch.tensor(replayed), torch.tensor(eager), rtol=1e-4, atol=1e-6)
    for one, other in zip(after, parameters, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-3, atol=1e-5)
