"""eps_loss, forward and with its backward, against a copy, eager PyTorch and torch.compile.

Noise given, or made again in the kernel from its seed, where the others have kept it in memory.
GB/s counts the bytes a perfect kernel moves: forward reads the prediction and the noise if it is
given; backward reads them again and writes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.op_table import Case, Op, Spec, spec_workload
from fastdiff import ops, reference
from fastdiff.reference.philox import sample_keys

SEED = 0
MODES = ("forward given", "forward seed", "train given", "train seed")


def mse(prediction: Tensor, noise: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(prediction, noise)


def gradient(
    prediction: Tensor, noise: Tensor, forward: Callable[[Tensor, Tensor], Tensor] = mse
) -> Tensor:
    (found,) = torch.autograd.grad(forward(prediction, noise), prediction)
    return found


def seeded_noise(shape: tuple[int, ...]) -> Tensor:
    """The noise of SEED, from the kernel, as the reference takes half a second per million values.

    The last samples are compared with the reference, or a wrong generator would agree with itself.
    """
    noise = ops.philox_normal(shape, SEED)
    keys, last = sample_keys(SEED, shape[0]), max(1, (1 << 18) // noise[0].numel())
    expected = reference.normals(keys[-last:], noise[-last:].shape, 0, torch.float32)
    worst = (noise[-last:] - expected).abs().max().item()
    if not worst <= 64 * torch.finfo(torch.float32).eps:
        raise RuntimeError(f"philox_normal is off by {worst:.3g}: no loss can be checked with it")
    return noise


def specify(case: Case) -> Spec:
    """The tensors of one workload, and what a right result is."""
    shape, dtype, memory_format, device = case.shape, case.dtype, case.memory_format, case.device
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(shape, generator=generator).to(dtype)
    prediction = prediction.to(device, memory_format=memory_format)
    passes, source = case.mode.split()
    noise = seeded_noise(shape) if source == "seed" else torch.randn(shape, generator=generator)
    noise = noise.to(device, dtype, memory_format=memory_format)
    how = {"seed": SEED} if source == "seed" else {"noise": noise}
    error = prediction.double() - noise.double()
    tensors = 1 + (source == "given")
    # Half-precision eager rounds the noise, its square or the scale; the regenerated noise is
    # float32, and the stored one, in the prediction's dtype, is the noise of the result.
    tolerance = max(torch.finfo(dtype).eps * 4, 2**-18)
    if passes == "forward":
        exact = error.square().mean()

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
        None if passes == "forward" else mse,
    )


OP = Op("eps_loss", MODES, spec_workload(specify), tiny_modes=MODES[:2])
