"""eps_loss, forward and with its backward, against a copy, eager PyTorch and torch.compile.

Noise given, or made again in the kernel from its seed, where the others have kept it in memory.
"noising + train" is what a training step does around its network: the others draw the noise, keep
it, and compute x_t and the loss with it; fastdiff makes it twice. GB/s counts the bytes a perfect
kernel moves: forward reads the prediction and the noise if it is given; backward reads them again
and writes the gradient; noising reads x0 and writes x_t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastdiff
from benchmarks.op_table import Case, Op, Spec, spec_workload
from benchmarks.suite import COPIES, OURS, Contender, Workload, compiled, copies
from fastdiff import ops, reference
from fastdiff.reference.philox import sample_keys

SEED = 0
T = 1000
MODES = ("forward given", "forward seed", "train given", "train seed", "noising + train")


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


def noised(x0: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and its noise, in plain PyTorch; a and s are (B, 1, 1, 1), in float32."""
    noise = torch.randn_like(x0)
    return (a * x0 + s * noise).to(x0.dtype), noise


def noising_and_training(case: Case) -> Workload:
    """x_t, and the gradient of the loss by a prediction: what surrounds a network."""
    shape, dtype, memory_format, device = case.shape, case.dtype, case.memory_format, case.device
    generator = torch.Generator().manual_seed(0)
    x0, prediction = (
        torch.randn(shape, generator=generator).to(device, dtype, memory_format=memory_format)
        for _ in range(2)
    )
    prediction.requires_grad_()
    t = torch.randint(T, shape[:1], generator=generator).to(device)
    tables = fastdiff.NoiseSchedule.linear(T).tables(device)
    table_a, table_s = tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar

    def ours() -> tuple[Tensor, Tensor]:
        x_t = ops.q_sample(x0, t, table_a, table_s, seed=SEED)
        return x_t, *torch.autograd.grad(ops.eps_loss(prediction, seed=SEED), prediction)

    def eager(noising: Callable = noised, loss: Callable = mse) -> tuple[Tensor, Tensor]:
        a, s = (table[t].view(-1, 1, 1, 1) for table in (table_a, table_s))
        x_t, noise = noising(x0, a, s)
        return x_t, *torch.autograd.grad(loss(prediction, noise), prediction)

    eps = torch.finfo(dtype).eps

    def error(result: tuple[Tensor, Tensor]) -> str | None:
        """The gradient tells the noise, which must be that of x_t, and normal."""
        x_t, grad = (x.double() for x in result)
        noise = prediction.detach().double() - grad * (grad.numel() / 2)
        a, s = (table[t].double().view(-1, 1, 1, 1) for table in (table_a, table_s))
        worst = (x_t - (a * x0.double() + s * noise)).abs().max().item()
        # Values up to 6 rounded in x_t, differences up to 10 rounded twice in the gradient.
        if not worst <= 16 * eps + 2**-18:
            return f"x_t and the gradient have different noise: {worst:.3g}"
        # Five standard errors of the mean square of N values.
        square = noise.square().mean().item()
        if not abs(square - 1) <= 5 * (2 / noise.numel()) ** 0.5 + eps:
            return f"the noise has a mean square of {square:.4g}"
        return None

    contenders = {OURS: Contender(ours, error), "eager": Contender(eager, error)}
    if case.compiled:
        parts = compiled(noised), torch.compile(mse, dynamic=False, fullgraph=True)
        contenders["compile"] = Contender(lambda: eager(*parts), error)
    contenders |= copies(x0)
    moved = dict.fromkeys(COPIES, 2 * x0.nbytes)
    return Workload(case.labels, 4 * x0.nbytes, contenders, moved)


_loss_alone = spec_workload(specify)


def workload(case: Case) -> Workload:
    return noising_and_training(case) if case.mode == MODES[-1] else _loss_alone(case)


OP = Op("eps_loss", MODES, workload, tiny_modes=MODES[:2])
