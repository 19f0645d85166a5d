"""The likelihood of the probability flow: a second estimate beside the bound (Math §6, §7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._models import Model, dtype_of, evaluating, keys_of, progress_bar, select
from fastdiff._types import check_tensors, check_type
from fastdiff.diffusion._dormand_prince import integrate
from fastdiff.diffusion.parameterizations import convert
from fastdiff.reference.q_sample import pixels_from_uint8

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion

_BIN = 2 / 255  # width of a pixel level


@dataclass(frozen=True)
class FlowLikelihood:
    """log p(x) of each sample under the probability flow.

    Attributes
    ----------
    log_likelihood : Tensor
        (B,) float64: the log density at x, in nats.
    bits_per_dim : Tensor
        (B,) float64: -log2 of density times volume of a pixel level, per dimension, to be compared
        with the bound.
    standard_error : Tensor
        (B,) float64: of bits_per_dim, from the spread of the probes; 0 for an exact trace, NaN for
        one probe. It does not see the noise of dequantization.
    latents : Tensor
        x_T, where the flow carries x to.
    evaluations : Tensor
        (B,) int64: how often the flow was evaluated, at two timesteps each.
    """

    log_likelihood: Tensor
    bits_per_dim: Tensor
    standard_error: Tensor
    latents: Tensor
    evaluations: Tensor


@torch.no_grad()
def flow_likelihood(
    diffusion: GaussianDiffusion,
    model: Model,
    x0: Tensor,
    seed: int | Tensor | None = None,
    *,
    probes: int | None = 4,
    dequantize: bool = False,
    end_snr: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_batch: int = 128,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> FlowLikelihood:
    """log p(x) = log N(x_T; 0, I) + integral of div v along the flow from x to x_T (Math §6).

    With sqrt(abar) = cos(phi) DDIM's ODE (eqs. 13-14) is dx/dphi = v, the v of v-prediction, and
    d log p / dphi = -div v along it (Score-SDE app. D.2). It starts at phi = 0, where v = 0 (a
    density has a score), and ends near the schedule's last timestep (`end_snr`). Between
    timesteps, where the network was not trained, v is interpolated linearly in phi. Dormand-Prince
    5(4) with a step size for each sample, so that no result depends on the batch.

    Parameters
    ----------
    x0
        (B, C, ...): uint8 levels, or pixels.
    seed
        Of the probes and of dequantization: an int, or int64 keys (B,); None draws an int from
        torch's generator.
    probes
        How many random signs z estimate div v = E[z^T (dv/dx) z] (Hutchinson), kept along the flow;
        each costs a backward pass. None: the exact trace, a backward pass per dimension.
    dequantize
        Add uniform noise as wide as a level. Then the mean of bits_per_dim is a bound on that of
        the levels' probability; without it a level's bin is taken for flat.
    end_snr
        The flow ends at the last timestep with at least this signal-to-noise ratio; what is there
        is taken for N(0, I). Default: 0 for v and x0, whose flow can be followed to the end; 1e-4
        for eps and the mean, whose errors v amplifies by 1 / sqrt(abar): a digits model on the
        cosine schedule (SNR 2e-9 at the end) had 7.0 bits/dim with 0, 5.4 with 1e-5 or 1e-4.
    rtol, atol
        Of the solver, for x and for the integral.
    max_batch
        How many images the model sees at a time: what limits memory.
    model_kwargs
        Passed to the model; of tensors whose first dimension is B, the entries of the samples.
    progress
        Show a bar on a terminal, if tqdm is installed.

    Returns
    -------
    FlowLikelihood
        On x0's device.

    Raises
    ------
    ValueError
        probes below 1, max_batch below 2, a seed of the wrong shape, or no timestep with end_snr.
    RuntimeError
        The solver finds no step that is small enough: the output is not finite, or not smooth.

    Examples
    --------
    >>> import torch, fastdiff
    >>> schedule = fastdiff.NoiseSchedule.linear(100)
    >>> model = fastdiff.analytic.GaussianDenoiser(torch.zeros(2), torch.ones(2), schedule)
    >>> x0 = torch.zeros(1, 2)
    >>> result = flow_likelihood(fastdiff.GaussianDiffusion(schedule), model, x0, probes=None)
    >>> round(float(result.log_likelihood), 3)  # -log(2 pi)
    -1.838
    """
    from fastdiff.diffusion.gaussian import GaussianDiffusion

    check_type("flow_likelihood", GaussianDiffusion, diffusion=diffusion)
    check_tensors("flow_likelihood", x0=x0)
    if probes is not None and probes < 1:
        raise ValueError(f"probes is {probes}, expected 1 or more, or None for the exact trace")
    if max_batch < 2:
        raise ValueError(f"max_batch is {max_batch}, expected 2 or more: a sample takes two places")
    nodes = _nodes(diffusion, end_snr)
    num, device = len(x0), x0.device
    keys = keys_of(seed, num, device)
    if x0.dtype == torch.uint8:
        x0 = pixels_from_uint8(x0)
    x = x0.to(torch.promote_types(x0.dtype, torch.float32))
    if dequantize:
        x = x + _BIN * (_uniform(x, keys) - 0.5)
    dim = x[0].numel() if num else 1
    states, evaluations = [x.new_empty(0, dim + (probes or 1))], [keys[:0]]
    with evaluating(model), progress_bar(num, "likelihood", progress) as bar:
        for part in torch.arange(num, device=device).split(max_batch // 2):
            flow = _Flow(diffusion, model, x[part], nodes, select(model_kwargs, part, num))
            signs = None if probes is None else _signs(x[part], keys[part], probes)

            def slope(phi: Tensor, y: Tensor, rows: Tensor, flow=flow, signs=signs) -> Tensor:
                return flow.slope(phi, y, rows, None if signs is None else signs[:, rows])

            start = torch.cat([x[part].flatten(1), x.new_zeros(len(part), probes or 1)], dim=1)
            end, taken = integrate(
                slope,
                start,
                0.0,
                float(nodes[-1]),
                rtol=rtol,
                atol=atol,
                first_step=float(nodes[0]),
                parts=(dim, probes or 1),
                on_finish=bar.update,
            )
            states.append(end)
            evaluations.append(taken)
    state = torch.cat(states).double()
    x_T, integrals = state[:, :dim], state[:, dim:]
    prior = -0.5 * (x_T.square().sum(1) + dim * math.log(2 * math.pi))
    log_likelihood = prior + integrals.mean(1)
    nats_to_bits = 1 / (dim * math.log(2))
    if probes is None:
        error = torch.zeros_like(prior)
    elif probes == 1:
        error = torch.full_like(prior, math.nan)
    else:
        error = integrals.std(1) / math.sqrt(probes)
    return FlowLikelihood(
        log_likelihood,
        -log_likelihood * nats_to_bits - math.log2(_BIN),
        error * nats_to_bits,
        x_T.view(x.shape).to(x.dtype),
        torch.cat(evaluations),
    )


class _Flow:
    """v(x, phi) of a batch, and its divergence, with phi between the schedule's timesteps."""

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        x: Tensor,
        nodes: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        self.diffusion = diffusion
        self.model = model
        self.shape = x.shape
        self.nodes = nodes.to(x.device, x.dtype)
        self.kwargs = kwargs

    def slope(self, phi: Tensor, y: Tensor, rows: Tensor, signs: Tensor | None) -> Tensor:
        """d/dphi of (x, integrals of div v), (R, D + P); signs (P, R, D)."""
        dim = self.shape[1:].numel()
        with torch.enable_grad():
            x = y[:, :dim].detach().requires_grad_()
            v = self._v(x.view(-1, *self.shape[1:]), phi, rows).flatten(1)
            if signs is None:
                units = torch.eye(dim, dtype=x.dtype, device=x.device)[:, None].expand(
                    -1, len(x), -1
                )
            else:
                units = signs
            traces = []
            for i, z in enumerate(units):
                (back,) = torch.autograd.grad(v, x, z, retain_graph=i + 1 < len(units))
                traces.append((back * z).sum(1))
        divergence = torch.stack(traces, 1)
        if signs is None:
            divergence = divergence.sum(1, keepdim=True)
        return torch.cat([v.detach(), divergence], dim=1)

    def _v(self, x: Tensor, phi: Tensor, rows: Tensor) -> Tensor:
        nodes = self.nodes
        above = torch.searchsorted(nodes, phi).clamp(max=len(nodes) - 1)
        below = (above - 1).clamp(min=0)
        low = torch.where(above > 0, nodes[below], 0.0)
        weight = (phi - low) / (nodes[above] - low)
        # v = 0 at phi = 0, below the first timestep.
        weights = torch.cat([torch.where(above > 0, 1 - weight, 0.0), weight])
        t = torch.cat([below, above])
        pairs = torch.cat([x, x])
        kwargs = select(self.kwargs, torch.cat([rows, rows]), self.shape[0])
        output = self.model(
            pairs.to(dtype_of(self.model) or x.dtype), self.diffusion.model_times(t), **kwargs
        )
        output, _ = self.diffusion.split_output(output, pairs)
        prediction = output.to(torch.promote_types(output.dtype, x.dtype))
        v = convert(self.diffusion.schedule, self.diffusion.prediction, "v", prediction, pairs, t)
        v = weights.view(-1, *[1] * (x.dim() - 1)) * v
        return v[: len(x)] + v[len(x) :]


def _nodes(diffusion: GaussianDiffusion, end_snr: float | None) -> Tensor:
    """phi of the timesteps that the flow passes, float64."""
    if end_snr is None:
        end_snr = 1e-4 if diffusion.prediction in ("eps", "mean") else 0.0
    schedule = diffusion.schedule
    passed = schedule.snr >= end_snr
    if not bool(passed.any()):
        raise ValueError(
            f"end_snr is {end_snr}, expected at most the first timestep's SNR, "
            f"{float(schedule.snr[0]):.6g}"
        )
    phi = torch.atan2(schedule.sqrt_one_minus_alpha_bars, schedule.sqrt_alpha_bars)
    return phi[passed]


def _signs(x: Tensor, keys: Tensor, probes: int) -> Tensor:
    """(P, B, D) random signs; stream 0 belongs to dequantization."""
    normals = [
        ops.philox_normal(x.shape, keys, stream=1 + k, device=x.device) for k in range(probes)
    ]
    return torch.stack([torch.where(n < 0, -1.0, 1.0).to(x.dtype).flatten(1) for n in normals])


def _uniform(x: Tensor, keys: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), to a float32 rounding."""
    normals = ops.philox_normal(x.shape, keys, device=x.device)
    return torch.special.ndtr(normals).to(x.dtype)
