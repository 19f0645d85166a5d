"""Traffic of eps_loss, posterior_mean and vlb_terms on the benchmark shapes: 1.05 x the bound."""

from __future__ import annotations

import pytest
import torch
from op_harness import evaluate, implementation_params
from op_harness.traffic import moved_bytes
from op_harness.vlb_terms_cases import FLOATS, TABLES

# Images of the published U-Nets, a latent of 512 x 512, and the digits; traffic grows with the
# batch, which only needs to be large enough for the one-row samples of the digits.
SHAPES = {
    "digits": (16, 1, 8, 8),
    "ddpm_cifar10": (2, 3, 32, 32),
    "ddim_celeba64": (1, 3, 64, 64),
    "latent64": (1, 4, 64, 64),
    "ddpm_256": (1, 3, 256, 256),
}
DEFAULT = {(shape, "bf16", "contiguous", "sm_90") for shape in ("ddpm_cifar10", "digits")}
GRID = [
    pytest.param(
        shape,
        dtype,
        layout,
        arch,
        id=f"{shape}-{dtype}-{layout}-{arch}",
        marks=() if (shape, dtype, layout, arch) in DEFAULT else pytest.mark.slow,
    )
    for shape in SHAPES
    for dtype in ("fp32", "bf16")
    for layout in ("contiguous", "channels_last")
    for arch in ("sm_80", "sm_90")
]
grid = pytest.mark.parametrize(("shape", "dtype", "layout", "arch"), GRID)
ptx = pytest.mark.parametrize("implementation", implementation_params("triton-ptx", "cuda-ptx"))


def images(shape: str, dtype: str, layout: str, heads: int = 1) -> torch.Tensor:
    batch, channels, *pixels = SHAPES[shape]
    x = torch.zeros(batch, heads * channels, *pixels, dtype=FLOATS[dtype])
    last = layout == "channels_last"
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@ptx
@grid
@pytest.mark.parametrize("mode", ["given", "seed"])
def test_eps_loss(
    mode: str, shape: str, dtype: str, layout: str, arch: str, implementation: str
) -> None:
    """Forward reads one tensor or two, backward the same and writes one."""
    x = images(shape, dtype, layout)
    noise, seed = (x.clone(), None) if mode == "given" else (None, 3)
    args = {
        "prediction": x,
        "noise": noise,
        "keys": None,
        "seed": seed,
        "stream": 0,
        "weight": None,
        "reduction": 1,
        "kind": 0,
    }
    result = evaluate(
        "eps_loss",
        implementation,
        args,
        gradients=("prediction",),
        grad_output=torch.tensor(1.0),
        arch=arch,
        count=True,
        racecheck=False,
    )
    inputs = 1 + (mode == "given")
    # The result is part of the bound: 0.4 % of sixteen of the digits.
    assert moved_bytes(result.launches[:-1], x.nbytes) <= 1.05 * (inputs * x.nbytes + 4)
    assert moved_bytes(result.launches[-1:], x.nbytes) <= 1.05 * (inputs + 1) * x.nbytes


@ptx
@grid
def test_posterior_mean(
    shape: str, dtype: str, layout: str, arch: str, implementation: str
) -> None:
    """Reads x0 and x_t, writes the mean."""
    x, table = images(shape, dtype, layout), torch.rand(4)
    args = {
        "x0": x,
        "t": torch.arange(len(x)) % 4,
        "coef_x0": table,
        "coef_x_t": table,
        "x_t": x.clone(),
        "keys": None,
        "seed": None,
        "stream": 0,
        "flip": None,
        "dtype": x.dtype,
    }
    result = evaluate("q_sample", implementation, args, arch=arch, count=True, racecheck=False)
    # t and two coefficients per sample are part of the bound: 5% of a sample of the digits.
    bound = 3 * x.nbytes + 16 * len(x)
    assert moved_bytes(result.launches, x.nbytes) <= 1.05 * bound


@ptx
@grid
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_vlb_terms(
    variance: str, shape: str, dtype: str, layout: str, arch: str, implementation: str
) -> None:
    """Forward reads x0, x_t, the noise and the output; backward of kl all but the noise."""
    heads = 2 if variance == "learned_range" else 1
    x, output = images(shape, dtype, layout), images(shape, dtype, layout, heads)
    batch = len(x)
    args = {
        "x0": x,
        "x_t": x.clone(),
        "model_output": output,
        "t": torch.full((batch,), 3),
        "table": TABLES[variance][:4],
        "noise": x.clone(),
        "keys": None,
        "seed": None,
        "stream": 0,
        "prediction": 0,
        "learned": heads == 2,
        "clip": True,
        "detach_mean": False,
    }
    result = evaluate(
        "vlb_terms",
        implementation,
        args,
        gradients=("model_output",),
        grad_output=torch.tensor([[1.0], [0.0], [0.0]]).expand(3, batch),
        arch=arch,
        count=True,
        racecheck=False,
    )
    # Per sample: t, three results or gradients; the rows of the table are few here.
    rest = 20 * batch + 64
    forward, backward = 3 * x.nbytes + output.nbytes, 2 * x.nbytes + 2 * output.nbytes
    assert moved_bytes(result.launches[:-1], x.nbytes) <= 1.05 * (forward + rest)
    assert moved_bytes(result.launches[-1:], x.nbytes) <= 1.05 * (backward + rest)
