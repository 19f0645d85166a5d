"""group_norm_silu's CUDA kernels with dropout and of a residual sum, on every path of the plan."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from op_harness import assert_close, implementation_params, unit_roundoff
from op_harness.cuda_ptx import group_norm_silu as launchers
from op_harness.cuda_ptx.launcher import emulated_launches
from op_harness.group_norm_silu import FLOATS, OPERANDS, Exact, operations
from torch import Tensor

from fastdiff.reference.dropout import Dropout, dropout_mask

pytestmark = [pytest.mark.parametrize("implementation", implementation_params("cuda-ptx"))]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Path:
    """What takes it: see test_group_norm_silu_cuda.py."""

    shape: tuple[int, ...]
    groups: int
    dtype: str
    arch: str
    launches: int  # of the forward pass
    slow: bool = False


PATHS = {
    "one pass": Path((2, 32, 8, 8), 8, "bf16", "sm_90", 1),
    "one pass fp32": Path((2, 32, 8, 8), 8, "fp32", "sm_80", 1, slow=True),
    "odd": Path((3, 12, 7, 5), 3, "fp16", "sm_90", 1),
    "side by side": Path((8, 64, 4, 4), 4, "bf16", "sm_90", 1),
    "cluster": Path((1, 8, 32, 64), 1, "bf16", "sm_90", 1),
    "cluster odd": Path((1, 6, 37, 41), 2, "fp32", "sm_90", 1, slow=True),
    "split": Path((1, 32, 48, 64), 1, "bf16", "sm_80", 3),
    "split fp32": Path((2, 32, 24, 64), 1, "fp32", "sm_80", 3, slow=True),
    "split odd": Path((1, 3, 131, 129), 1, "fp32", "sm_80", 3),
}
every_path = pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name, marks=[pytest.mark.slow] if path.slow else [])
        for name, path in PATHS.items()
    ],
)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def tensor(path: Path, layout: str, seed: int) -> Tensor:
    noise = torch.randn(path.shape, generator=torch.Generator().manual_seed(seed))
    return (2 * noise + 0.5).to(FLOATS[path.dtype]).contiguous(memory_format=LAYOUTS[layout])


def arguments(path: Path, x: Tensor, activation: int, names: tuple[str, ...]) -> dict:
    batch, channels = path.shape[:2]
    generator = torch.Generator().manual_seed(5)
    sizes = dict.fromkeys(OPERANDS, (batch, channels)) | {
        "weight": (channels,),
        "bias": (channels,),
    }
    given = {
        n: torch.randn(sizes[n], generator=generator) if n in names else None for n in OPERANDS
    }
    return {
        "x": x,
        "num_groups": path.groups,
        "weight": given["weight"],
        "bias": given["bias"],
        "eps": 1e-5,
        "channel_bias": given["channel_bias"],
        "scale": given["scale"],
        "shift": given["shift"],
        "activation": activation,
    }


class Nan:
    """Fresh memory holds NaN, so that an element nobody wrote shows."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


def forward(path: Path, args: dict, **variant: object) -> tuple[Tensor, ...]:
    with emulated_launches("group_norm_silu", path.arch, seed=3) as launches, Nan():
        results = launchers.group_norm_silu(*args.values(), **variant)
    assert len(launches) == path.launches, [launch.entry for launch in launches]
    return results


def backward(
    path: Path, args: dict, grad: Tensor, mean: Tensor, rstd: Tensor, **variant: object
) -> dict[str, Tensor]:
    """Gradients by name."""
    small = {name: args[name] for name in OPERANDS}
    names = [name for name, operand in small.items() if operand is not None]
    with emulated_launches("group_norm_silu", path.arch, seed=4), Nan():
        x, *found = launchers.group_norm_silu_backward(
            grad,
            args["x"],
            mean,
            rstd,
            args["num_groups"],
            *small.values(),
            args["activation"],
            True,
            *(name in names for name in small),
            **variant,
        )
    named = dict(zip((*OPERANDS, "sum_bias"), found, strict=False))
    return {"x": x} | {n: g for n, g in named.items() if g is not None}


def assert_sums(sum_bias: Tensor, grad_x: Tensor) -> None:
    """Over samples and pixels, of grad_x before it was rounded: errors of random signs."""
    values = grad_x.double()
    once = unit_roundoff(grad_x.dtype) * values.square().sum((0, 2, 3)).sqrt()
    added = 2.0**-24 * values.abs().sum((0, 2, 3))
    expected = values.sum((0, 2, 3))
    result = unit_roundoff(sum_bias.dtype) * expected.abs()
    assert ((sum_bias.double() - expected).abs() <= 8 * once + added + result).all()


def dropout_of(path: Path, threshold: int, by_keys: bool) -> Dropout:
    generator = torch.Generator().manual_seed(9)
    keys = torch.randint(-(2**62), 2**62, path.shape[:1], generator=generator)
    given = {"keys": keys, "seed": None} if by_keys else {"keys": None, "seed": 2**40 + 77}
    return Dropout(threshold=threshold, stream=2**33 + 5, **given)


@every_path
@every_layout
def test_dropout(implementation: str, path: Path, layout: str) -> None:
    """The mask bit for bit, values and gradients against float64."""
    x = tensor(path, layout, 0)
    args = arguments(path, x, 0, ("weight", "bias", "channel_bias", "scale", "shift"))
    dropout = dropout_of(path, 77, layout == "contiguous")
    kept = dropout_mask(x, dropout)
    y, mean, rstd = forward(path, args, dropout=dropout)
    assert not y[~kept].any()
    assert y[kept].ne(0).float().mean() > 0.999
    factor = kept * dropout.scale
    exact = Exact(args)
    expected, size = exact.forward()
    assert_close(y, expected * factor, magnitude=size * factor, operations=operations(args))
    grad = tensor(path, layout, 1)
    found = backward(path, args, grad, mean, rstd, dropout=dropout)
    names = tuple(found)
    assert set(names) == {"x", *OPERANDS}
    for name, (value, size) in exact.backward(grad.double() * factor, names).items():
        assert_close(found[name], value, magnitude=size, operations=2 * operations(args))


@pytest.mark.parametrize("threshold", [1, 128, 255])
@every_layout
def test_thresholds_of_dropout(implementation: str, layout: str, threshold: int) -> None:
    """Signs of bytes carry right at the ends of the range."""
    path = Path((1, 64, 16, 16), 2, "bf16", "sm_90", 1)
    x = tensor(path, layout, 0)
    args = arguments(path, x, 1, ("bias",))
    dropout = dropout_of(path, threshold, True)
    kept = dropout_mask(x, dropout)
    y = forward(path, args, dropout=dropout)[0]
    assert torch.equal(y.ne(0), kept)


@every_path
@every_layout
def test_residual(implementation: str, path: Path, layout: str) -> None:
    """The sum bit for bit, the rest as of a plain call on it; gradients against float64."""
    x, residual = tensor(path, layout, 0), tensor(path, layout, 2)
    names = ("weight", "bias", "scale", "shift")
    args = arguments(path, x, 0, names)
    sum_bias = torch.randn(path.shape[1], generator=torch.Generator().manual_seed(6))
    y, mean, rstd, total = forward(path, args, residual=residual, sum_bias=sum_bias)
    per_channel = sum_bias[:, None, None]
    assert torch.equal(total, (x.float() + residual.float() + per_channel).to(x.dtype))
    args["x"] = total
    for found, plain in zip((y, mean, rstd), forward(path, args), strict=True):
        assert torch.equal(found, plain)

    grad, grad_sum = tensor(path, layout, 1), tensor(path, layout, 3)
    found = backward(path, args, grad, mean, rstd, grad_sum=grad_sum, sum_bias_type=sum_bias.dtype)
    exact = Exact(args).backward(grad, ("x", *names))
    value, size = exact["x"]
    exact["x"] = value + grad_sum.double(), size + grad_sum.double().abs()
    assert_sums(found.pop("sum_bias"), found["x"])
    assert set(found) == set(exact)
    for name, (value, size) in exact.items():
        assert_close(found[name], value, magnitude=size, operations=2 * operations(args))


@pytest.mark.parametrize("name", ["one pass", "side by side", "cluster", "split"])
def test_residual_without_a_part(implementation: str, name: str) -> None:
    """No bias of the sum, no gradient of the sum, no gradient of its bias."""
    path, layout = PATHS[name], "channels_last"
    x, residual, grad = (tensor(path, layout, k) for k in range(3))
    args = arguments(path, x, 0, ("weight",))
    _, mean, rstd, total = forward(path, args, residual=residual)
    assert torch.equal(total, (x.float() + residual.float()).to(x.dtype))
    args["x"] = total
    plain = backward(path, args, grad, mean, rstd)
    with_bias = backward(path, args, grad, mean, rstd, sum_bias_type=x.dtype)
    assert torch.equal(with_bias["x"], plain["x"])
    assert_sums(with_bias["sum_bias"], plain["x"])
    value, size = Exact(args).backward(grad, ("x",))["x"]
    added = backward(path, args, grad, mean, rstd, grad_sum=grad)
    assert set(added) == {"x", "weight"}
    assert_close(
        added["x"], value + grad.double(), magnitude=size + grad.double().abs(),
        operations=2 * operations(args),
    )  # fmt: skip


# Of ddpm_cifar10: (shape, groups) at which a block has its own samples, shares one, or has several.
TRAFFIC = [((1, 128, 32, 32), 32), ((2, 256, 8, 8), 32), ((16, 256, 4, 4), 32)]


def moved(launches: list) -> tuple[int, float]:
    """Bytes, and whole sectors relative to the fewest that hold them."""
    counters = [launch.counters for launch in launches]
    requests = [r for c in counters for r in (c.total.load_requests, c.total.store_requests)]
    total = sum(c.global_load_bytes + c.global_store_bytes for c in counters)
    return total, sum(r.sector_bytes for r in requests) / sum(32 * r.min_sectors for r in requests)


@pytest.mark.parametrize("which", ["residual", "residual backward", "dropout", "dropout backward"])
@pytest.mark.parametrize(("shape", "groups"), TRAFFIC)
@every_layout
def test_traffic(
    implementation: str, layout: str, shape: tuple[int, ...], groups: int, which: str
) -> None:
    """Two reads and two writes of a residual sum, backward three reads and one write."""
    path = Path(shape, groups, "bf16", "sm_90", 1)
    batch, channels = shape[:2]
    x, grad = tensor(path, layout, 0), tensor(path, layout, 1)
    args = arguments(path, x, 0, ("weight", "bias"))
    dropout = dropout_of(path, 26, False)
    sum_bias = torch.ones(channels)
    statistics = torch.ones(2, batch, groups)
    wants = (True, True, False, False, False)
    with emulated_launches("group_norm_silu", path.arch, racecheck=False, count=True) as launches:
        if which == "residual":
            launchers.group_norm_silu(*args.values(), residual=grad, sum_bias=sum_bias)
        elif which == "dropout":
            launchers.group_norm_silu(*args.values(), dropout=dropout)
        else:
            given = [args[name] for name in OPERANDS]
            variant = {"dropout": dropout}
            if which == "residual backward":
                variant = {"grad_sum": grad, "sum_bias_type": sum_bias.dtype}
            launchers.group_norm_silu_backward(
                grad, x, *statistics, groups, *given, 0, True, *wants, **variant
            )
    tensors = {"residual": 4, "residual backward": 4, "dropout": 2, "dropout backward": 3}[which]
    # Operands per sample, and sums over its pixels that are written, read and added up.
    operands = 3 if which == "residual" else 2
    rows = {"residual backward": 3, "dropout backward": 2}.get(which, 0)
    small = batch * channels * (operands + 2 * rows) + channels * rows
    total, sectors = moved(launches)
    bound = tensors * x.nbytes + 4 * (small + 2 * batch * groups)
    assert total <= 1.05 * bound, (total / bound, [launch.entry for launch in launches])
    assert sectors <= 1.1, sectors
