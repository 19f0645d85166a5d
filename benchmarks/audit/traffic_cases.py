"""What the traffic report runs: calls of every op with the fewest bytes that they need."""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastdiff
from benchmarks import (
    bench_ddim_step,
    bench_eps_loss,
    bench_posterior_mean,
    bench_q_sample,
    bench_vlb_terms,
)
from benchmarks.activation_memory import eager_group_norm_silu
from benchmarks.shapes import GROUP_NORM_BATCHES, GroupNormSite, group_norm_sites
from fastdiff.reference.step_columns import StepColumn

# The emulator belongs to the tests, which are not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests"))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGES = {
    "digits": ((1, 8, 8), 64),
    "ddpm_cifar10": ((3, 32, 32), 128),
    "ddim_celeba64": ((3, 64, 64), 64),
    "latent64": ((4, 64, 64), 16),
    "ddpm_256": ((3, 256, 256), 16),
}
# (network, channels, side, batch): where the time goes in each network, and its smallest layers.
CHOSEN_SITES = (
    ("ddpm_cifar10", 256, 32, 128),
    ("ddpm_cifar10", 128, 32, 16),
    ("ddpm_cifar10", 256, 16, 1),
    ("ddpm_cifar10", 256, 4, 16),
    ("ddpm_256", 128, 256, 4),
    ("ddpm_256", 256, 64, 4),
    ("ddpm_256", 512, 16, 1),
    ("vae", 512, 64, 1),
    ("vae", 128, 512, 1),
)


@dataclass(frozen=True)
class Call:
    """One call of a raw operator, or the backward pass of one.

    Attributes
    ----------
    arguments, gradients, grad_output
        As `op_harness.evaluate` takes them. `gradients` empty: the forward pass is counted.
    bound
        Bytes of a perfect kernel for these arguments: each tensor the fewest times, and the small
        inputs and results once.
    eager, eager_arguments
        What everybody writes, of which kernels are counted on the meta device.
    eager_forward
        The part of `eager` that is its forward pass, where that is not counted.
    scale
        Samples in the reported batch per sample in the arguments.
    """

    op: str
    mode: str
    arguments: dict[str, Any]
    tensor_bytes: int
    bound: int
    eager: Callable[..., Any]
    eager_arguments: tuple[Any, ...]
    gradients: tuple[str, ...] = ()
    grad_output: Tensor | None = None
    eager_forward: Callable[..., Any] | None = None
    scale: float = 1.0
    labels: dict[str, str] = field(default_factory=dict)


def _row_call(x: Tensor, heads: int = 1) -> dict[str, Any]:
    """Inputs of the elementwise ops around x; all zeros, as values decide nothing here."""
    batch = len(x)
    wide = torch.zeros((batch, heads * x.shape[1], *x.shape[2:]), dtype=x.dtype)
    last = not x.is_contiguous()
    return {
        "output": wide.contiguous(memory_format=torch.channels_last) if last else wide,
        "t": torch.full((batch,), 3),
        "seed": {"keys": None, "seed": 3, "stream": 0},
        "given": {"keys": None, "seed": None, "stream": 0},
        "small": 8 * batch,  # an index per sample; the row that they share here is not counted
    }


def _q_sample(x: Tensor) -> Iterator[Call]:
    table, common = torch.rand(8), _row_call(x)
    tables = {"t": common["t"], "sqrt_alpha_bar": table, "sqrt_one_minus_alpha_bar": table}
    small, arguments = common["small"], (x, common["t"], table, table)
    pixels = torch.zeros_like(x, dtype=torch.uint8)
    for mode, x0, bound in (("given", x, 3), ("seed", x, 2), ("uint8, seed", pixels, 1)):
        given = mode == "given"
        source = common["given" if given else "seed"]
        eager = bench_q_sample.eager_q_sample if given else bench_q_sample.eager_with_noise
        if mode.startswith("uint8"):
            eager = bench_q_sample.eager_from_uint8
            eager_arguments = (pixels, *arguments[1:], x.dtype)
        else:
            eager_arguments = (*arguments, x) if given else arguments
        noise = x.clone() if given else None
        yield Call(
            "q_sample",
            mode,
            {"x0": x0, **tables, "noise": noise, **source, "flip": None, "dtype": x.dtype},
            x.nbytes,
            bound * x.nbytes + (pixels.nbytes if mode.startswith("uint8") else 0) + small,
            eager,
            eager_arguments,
        )
    yield Call(
        "q_sample",
        "as posterior_mean",
        {"x0": x, **tables, "noise": x.clone(), **common["given"], "flip": None, "dtype": x.dtype},
        x.nbytes,
        3 * x.nbytes + small,
        bench_posterior_mean.eager,
        (x, x, *arguments[1:]),
    )


def _eps_loss(x: Tensor) -> Iterator[Call]:
    common = _row_call(x)
    for mode, inputs in (("given", 2), ("seed", 1)):
        noise = x.clone() if mode == "given" else None
        arguments = {"prediction": x, "noise": noise, **common[mode]}
        arguments |= {"weight": None, "reduction": 1, "kind": 0}
        bound = inputs * x.nbytes
        yield Call("eps_loss", mode, arguments, x.nbytes, bound, bench_eps_loss.mse, (x, x))
        yield Call(
            "eps_loss",
            f"{mode}, backward",
            arguments,
            x.nbytes,
            bound + x.nbytes,
            bench_eps_loss.gradient,
            (x.detach().requires_grad_(), x),
            ("prediction",),
            torch.tensor(1.0),
            bench_eps_loss.mse,
        )


def _sampler_step(x: Tensor) -> Iterator[Call]:
    schedule = fastdiff.NoiseSchedule.linear(1000)
    for op, mode, accesses in (
        ("ddim_step", "guided", 4),
        ("ddim_step", "guided, seed", 4),
        ("ddpm_step", "learned, seed", 4),
    ):
        learned = op == "ddpm_step"
        common = _row_call(x, 1 + learned)
        table = (
            schedule.ddpm_table([0, 9, 99, 999], "learned_range")
            if learned
            else schedule.ddim_table([0, 9, 99, 999], 1.0)
        )
        row = torch.zeros(len(StepColumn), 1, dtype=x.dtype)
        noisy = mode.endswith("seed")
        output = common["output"]
        yield Call(
            op,
            mode,
            {
                "x_t": x,
                "model_output": output,
                "step": common["t"],
                "table": table,
                "prediction": 0,
                "clip": True,
                "flag": learned,
                "uncond": None if learned else output.clone(),
                "guidance_scale": 1.0 if learned else 3.0,
                "noise": None,
                **common["seed" if noisy else "given"],
                "return_pred_x0": False,
            },
            x.nbytes,
            accesses * x.nbytes + common["small"],
            bench_ddim_step.eager_ddpm if learned else bench_ddim_step.eager_ddim,
            (x, output, row) if learned else (x, output, output.clone(), row, noisy),
        )


def _vlb_terms(x: Tensor) -> Iterator[Call]:
    schedule = fastdiff.NoiseSchedule.linear(1000)
    table = schedule.ddpm_table([0, 9, 99, 999], "learned_range")
    common = _row_call(x, 2)
    output, batch = common["output"], len(x)
    arguments = {
        "x0": x,
        "x_t": x.clone(),
        "model_output": output,
        "t": common["t"],
        "table": table,
        "noise": x.clone(),
        **common["given"],
        "prediction": 0,
        "learned": True,
        "clip": True,
        "detach_mean": False,
    }
    eager = (x, x.clone(), output, common["t"], table, x.clone())
    forward = 3 * x.nbytes + output.nbytes + common["small"] + 12 * batch
    yield Call("vlb_terms", "learned", arguments, x.nbytes, forward, bench_vlb_terms.eager, eager)
    yield Call(
        "vlb_terms",
        "learned, backward",
        arguments,
        x.nbytes,
        2 * x.nbytes + 2 * output.nbytes + common["small"] + 12 * batch,
        bench_vlb_terms.gradient,
        (*eager[:2], output.detach().requires_grad_(), *eager[3:]),
        ("model_output",),
        torch.tensor([[1.0], [0.0], [0.0]]).expand(3, batch),
        bench_vlb_terms.eager,
    )


def image_calls(dtype: str, layout: str, names: tuple[str, ...]) -> Iterator[Call]:
    """The elementwise ops on images of the published networks.

    Counted with one sample of large images: a sample's blocks do not depend on the batch.
    """
    for name in names:
        shape, batch = IMAGES[name]
        counted = min(batch, 16 if math.prod(shape) < 4096 else 1)
        x = torch.zeros((counted, *shape), dtype=DTYPES[dtype])
        x = x.contiguous(memory_format=LAYOUTS[layout])
        labels = {"shape": f"{name} b{batch}", "dtype": dtype, "layout": layout}
        for make in (_q_sample, _eps_loss, _sampler_step, _vlb_terms):
            for call in make(x):
                yield Call(**vars(call) | {"scale": batch / counted, "labels": labels})


def chosen_sites(quick: bool = False) -> Iterator[tuple[GroupNormSite, int]]:
    """Layers and batch sizes: `CHOSEN_SITES`, or two small ones."""
    for network, channels, side, batch in CHOSEN_SITES[2:4] if quick else CHOSEN_SITES:
        found = [s for s in group_norm_sites(network) if (s.channels, s.height) == (channels, side)]
        yield max(found, key=lambda s: (s.activation == "silu", s.count)), batch


def all_sites() -> Iterator[tuple[GroupNormSite, int]]:
    """Every distinct layer of the published networks, at every batch size."""
    for network, batches in GROUP_NORM_BATCHES.items():
        for site in group_norm_sites(network):
            for batch in batches:
                yield site, batch


def group_norm_calls(
    dtype: str, layout: str, arch: str, sites: Iterable[tuple[GroupNormSite, int]]
) -> Iterator[Call]:
    """group_norm_silu at layers of the published networks, with the operands of the layer."""
    from op_harness.group_norm_traffic import bound

    for site, batch in sites:
        shape, channels = site.shape(batch), site.channels
        # Zeros that nobody reads take no memory, unless they are copied to another layout.
        if layout == "channels_last":
            x = torch.zeros((batch, *shape[2:], channels), dtype=DTYPES[dtype]).permute(0, 3, 1, 2)
        else:
            x = torch.zeros(shape, dtype=DTYPES[dtype])
        per_sample = torch.zeros(batch, channels)
        operands = {
            name: None if name not in site.operands else per_sample
            for name in ("weight", "bias", "channel_bias", "scale", "shift")
        }
        operands |= {"weight": torch.ones(channels), "bias": torch.zeros(channels)}
        given = ("x", *site.operands)
        rest = {n: operands[n] for n in ("channel_bias", "scale", "shift")}
        arguments = {
            "x": x,
            "num_groups": site.num_groups,
            "weight": operands["weight"],
            "bias": operands["bias"],
            "eps": 1e-5,
            **rest,
            "activation": ("silu", "identity").index(site.activation),
        }

        # Half-precision networks hold their parameters in half precision.
        low = {n: None if v is None else v.to(x.dtype) for n, v in operands.items()}

        def forward(*tensors: Tensor, site: Any = site, given: tuple = given) -> Tensor:
            passed = dict(zip(given, tensors, strict=True))
            return eager_group_norm_silu(
                num_groups=site.num_groups, activation=site.activation, **passed
            )

        def both(grad: Tensor, *tensors: Tensor, forward: Any = forward) -> Any:
            return torch.autograd.grad(forward(*tensors), tensors, grad)

        inputs = (x, *(low[name] for name in site.operands))
        labels = {"shape": f"{site} b{batch}", "dtype": dtype, "layout": layout}
        for mode, gradients in (("forward", ()), ("backward", given)):
            last = layout == "channels_last"
            accesses = bound(shape, site.num_groups, x.element_size(), last, mode, arch)
            # The operands, in backward their gradients as well, and mean and rstd.
            small = sum(operands[name].nbytes for name in site.operands) * (1 + bool(gradients))
            small += 8 * batch * site.num_groups
            wanted = tuple(t.detach().requires_grad_() for t in inputs)
            yield Call(
                "group_norm_silu",
                mode,
                arguments,
                x.nbytes,
                accesses * x.nbytes + small,
                both if gradients else forward,
                (x, *wanted) if gradients else inputs,
                gradients,
                x if gradients else None,
                (lambda grad, *t, forward=forward: forward(*t)) if gradients else None,
                labels=labels,
            )
