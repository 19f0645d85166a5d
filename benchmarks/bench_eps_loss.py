"""eps_loss, forward and with its backward, against a copy, eager PyTorch and torch.compile.

    python -m benchmarks.bench_eps_loss [--device cpu] [--quick] [--json FILE]

Noise given, or made again in the kernel from its seed, where the others have kept it in memory.
GB/s counts the bytes a perfect kernel moves: forward reads the prediction and the noise if it is
given; backward reads them again and writes the gradient.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks import machine, op_table
from benchmarks.op_table import Goal, Spec
from fastdiff import ops, reference
from fastdiff.reference.philox import sample_keys

SEED = 0
MODES = ("forward given", "forward seed", "train given", "train seed")
GOALS = (
    Goal("forward + backward over eager", 2.0, MODES[2:], False, op_table.over_eager),
    Goal(
        "noise given, out of cache: share of copy bandwidth",
        0.8,
        ("forward given", "train given"),
        True,
        op_table.of_copy,
    ),
)


def mse(prediction: Tensor, noise: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(prediction, noise)


def gradient(prediction: Tensor, noise: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(mse(prediction, noise), prediction)
    return found


def specify(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    mode: str,
    device: torch.device,
) -> Spec:
    """The tensors of one workload, and what a right result is."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(shape, generator=generator).to(dtype)
    prediction = prediction.to(device, memory_format=memory_format)
    keys = sample_keys(SEED, shape[0])
    noise = reference.normals(keys, torch.Size(shape), 0, torch.float32)
    noise = noise.to(device, dtype, memory_format=memory_format)
    passes, source = mode.split()
    how = {"seed": SEED} if source == "seed" else {"noise": noise}
    error = prediction.float() - noise.float()
    tensors = 1 + (source == "given")
    # Half-precision eager rounds the noise, its square or the scale; the regenerated noise is
    # float32, and the stored one, in the prediction's dtype, is the noise of the result.
    tolerance = max(torch.finfo(dtype).eps * 4, 2**-18)
    if passes == "forward":
        exact = error.double().square().mean()

        def ours() -> Tensor:
            return ops.eps_loss(prediction, **how)

        eager = mse
    else:
        exact = 2 * error / error.numel()
        prediction.requires_grad_()
        tensors += tensors + 1

        def ours() -> Tensor:
            (found,) = torch.autograd.grad(ops.eps_loss(prediction, **how), prediction)
            return found

        eager = gradient
    return Spec(
        ours,
        eager,
        (prediction, noise),
        exact,
        tolerance,
        tensors * prediction.nbytes,
        prediction.detach(),
    )


def main(argv: list[str] | None = None) -> int:
    return op_table.main("bench_eps_loss", __doc__, MODES, specify, GOALS, argv)


if __name__ == "__main__":
    machine.ensure_steady_allocator()
    sys.exit(main())
