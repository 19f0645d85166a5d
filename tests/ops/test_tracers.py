"""All ops where somebody watches: torch.jit.trace, ONNX, make_fx, DTensor and forward-mode AD.

There they run in plain PyTorch, whose operators the others know, or as one operator of a graph.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from op_harness import exact
from op_harness.raw_arguments import arguments
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastdiff
from fastdiff import ops

OPS = tuple(exact.PUBLIC)
# A few roundings of float32 between two orders of the same sums.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def given_noise(op: str) -> dict[str, Any]:
    """Arguments in float32; noise that a seed makes would be 64-bit integers, which ONNX lacks."""
    args = {
        k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in arguments(op).items()
    }
    if args.get("noise") is None and "noise" in args:
        main = next(iter(args.values()))
        args |= {"keys": None, "seed": None, "noise": torch.linspace(-2, 2, main.numel())}
        args["noise"] = args["noise"].reshape(main.shape)
    return args


def function(op: str, args: dict[str, Any], names: tuple[str, ...]) -> Callable[..., Tensor]:
    def f(*operands: Tensor) -> Tensor:
        found = exact.PUBLIC[op](args | dict(zip(names, operands, strict=True)))
        return found[0] if isinstance(found, tuple) else found

    return f


class Module(nn.Module):
    def __init__(self, f: Callable[..., Tensor]):
        super().__init__()
        self.f = f

    def forward(self, *operands: Tensor) -> Tensor:
        return self.f(*operands)


def case(op: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]:
    """The op of all its tensors, those, and the result."""
    args = given_noise(op)
    names = tuple(k for k, x in args.items() if isinstance(x, Tensor))
    f = function(op, args, names)
    operands = tuple(args[name] for name in names)
    return f, operands, f(*operands)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript and the older exporter are deprecated
        yield


@pytest.mark.parametrize("op", OPS)
def test_jit_trace(op: str) -> None:
    f, operands, expected = case(op)
    traced = torch.jit.trace(f, operands)
    assert "fastdiff::" not in str(traced.inlined_graph)  # so it runs where fastdiff is not
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(*operands), expected, **CLOSE)


def test_jit_trace_of_normals() -> None:
    keys = ops.sample_keys(3, 2)
    f = lambda keys: ops.philox_normal((2, 3, 4, 4), seed=keys)  # noqa: E731
    traced = torch.jit.trace(f, (keys,))
    assert "fastdiff::" not in str(traced.inlined_graph)
    for given in (keys, keys + 1):
        torch.testing.assert_close(traced(given), f(given), rtol=0, atol=4 * 2.0**-24 * 6)


def test_a_backend_that_was_asked_for_is_not_traced_past() -> None:
    f, operands, _ = case("q_sample")
    with (
        fastdiff.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"'cpu' was asked for, but torch\.jit\.trace records"),
    ):
        torch.jit.trace(f, operands)


@pytest.mark.parametrize("dynamo", [False, True])
# Of vlb_terms ONNX lacks expm1 and log_ndtr.
@pytest.mark.parametrize("op", [op for op in OPS if op != "vlb_terms"])
def test_onnx(op: str, dynamo: bool, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    f, operands, expected = case(op)
    path = str(tmp_path / "op.onnx")
    quiet = {"verbose": False} if dynamo else {}
    torch.onnx.export(Module(f), operands, path, dynamo=dynamo, **quiet)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {i.name: np.asarray(x) for i, x in zip(session.get_inputs(), operands, strict=True)}
    found = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("op", OPS)
def test_make_fx_of_gradients(op: str, mode: str) -> None:
    args = given_noise(op)
    name = exact.DIFFERENTIABLE[op][0]
    others = tuple(k for k, x in args.items() if isinstance(x, Tensor) and k != name)
    f = function(op, args, (name, *others))
    x = args[name].clone().requires_grad_()
    operands = (x, *(args[k] for k in others))

    def gradient(*operands: Tensor) -> Tensor:
        return torch.autograd.grad(f(*operands).sum(), operands[0])[0]

    graph = make_fx(gradient, tracing_mode=mode)(*operands)
    torch.testing.assert_close(graph(*operands), gradient(*operands), **CLOSE)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode(op: str) -> None:
    """Dual numbers, as torch.func.jvp makes them, of leaves with and without a gradient."""
    args = given_noise(op)
    name = exact.DIFFERENTIABLE[op][0]
    f = function(op, args, (name,))
    x = args[name]
    tangent = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    out, expected = torch.func.jvp(f, (x,), (tangent,))
    for needs in (False, True):
        leaf = x.clone().requires_grad_(needs)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(f(forward_ad.make_dual(leaf, tangent)))
        torch.testing.assert_close(found.primal.detach(), out, **CLOSE)
        torch.testing.assert_close(found.tangent.detach(), expected, **CLOSE)


@pytest.mark.parametrize("op", OPS)
def test_dtensor(op: str, tmp_path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor

    f, operands, expected = case(op)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = [distribute_tensor(x, mesh, [Replicate()]) for x in operands]
        try:
            found = f(*sharded).full_tensor()
        except NotImplementedError as error:
            # Of torch's own operators older ones shard fewer; ours is not among them.
            if "Operator aten." not in str(error) or torch.__version__ >= (2, 14):
                raise
            pytest.skip(f"torch {torch.__version__}: {error}")
        torch.testing.assert_close(found, expected, **CLOSE)
    finally:
        dist.destroy_process_group()
