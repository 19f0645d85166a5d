"""Which timesteps are trained on, and how their losses are weighted for it (Math §6).

Both samplers turn random keys into timesteps, so that a timestep, like the noise, belongs to a
sample and not to the batch around it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff._models import keys_of
from fastdiff._types import check_ints, check_name

_KEY_BITS = 53  # of a key become a uniform float64


class UniformTimesteps:
    """t uniform in 0..T-1, every weight 1 (DDPM algorithm 1).

    Parameters
    ----------
    num_timesteps
        T.
    device
        Where timesteps are drawn.
    """

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = num_timesteps
        self.device = torch.device(device)

    def sample(self, num: int, seed: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw `num` timesteps.

        Parameters
        ----------
        seed
            An int, or int64 keys (num,) of the samples; None draws an int from torch's
            generator.

        Returns
        -------
        tuple of Tensor
            t (num,) int64, and float32 weights (num,) for the losses of these samples: the mean of
            weight * loss estimates the mean loss over uniform t, whatever t was drawn from.
        """
        t = self._draw(keys_of(seed, num, self.device))
        return t, self.weights(t)

    def weights(self, t: Tensor) -> Tensor:
        """Weight 1 / (T p_t) of a loss at t, float32."""
        return torch.ones_like(t, dtype=torch.float32)

    def update(self, t: Tensor, loss: Tensor, *, largest: int | None = None) -> None:
        """Learn from the unweighted losses (B,) at t (B,); uniform sampling learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises
        ------
        ValueError
            The state is of another sampler, or of another T.
        """
        if state:
            raise ValueError(f"expected an empty state, got {', '.join(sorted(state))}")

    def _draw(self, keys: Tensor) -> Tensor:
        return keys.remainder(self.num_timesteps)


class LossSecondMomentTimesteps(UniformTimesteps):
    """t with probability p_t ~ sqrt(E[L_t^2]), weights 1 / (T p_t) (IDDPM eq. 18, Math §6).

    The choice of p that minimizes the variance of the estimated bound, whose terms differ by orders
    of magnitude. E[L_t^2] is the mean over the last `history` losses at t; until every t has as
    many, t is uniform. Nothing waits for the device, but for batches of unknown sizes of several
    processes (see `update`).

    Parameters
    ----------
    num_timesteps
        T.
    device
        Where the history lives and timesteps are drawn; one that has float64 (not mps).
    history
        Losses remembered per timestep (IDDPM: 10).
    uniform
        Share of uniform sampling mixed into p (IDDPM: 0.001), so that no t is forgotten.

    Examples
    --------
    >>> import torch
    >>> from fastdiff.diffusion.timestep_samplers import LossSecondMomentTimesteps
    >>> timesteps = LossSecondMomentTimesteps(1000)
    >>> t, weights = timesteps.sample(64, seed=0)
    >>> loss = torch.rand(64)  # diffusion.training_losses(model, x0, t)["loss"]
    >>> timesteps.update(t, loss)
    >>> mean = (weights * loss).mean()  # to be differentiated
    """

    def __init__(
        self,
        num_timesteps: int,
        device: torch.device | str = "cpu",
        *,
        history: int = 10,
        uniform: float = 0.001,
    ) -> None:
        super().__init__(num_timesteps, device)
        check_ints(1, history=history)
        if not 0 < uniform <= 1:
            raise ValueError(f"uniform is {uniform}, expected more than 0 and at most 1")
        self.uniform = uniform
        # Row T takes what must leave no trace: a store whose size is known needs no wait.
        self._history = torch.zeros(
            num_timesteps + 1, history, dtype=torch.float64, device=self.device
        )
        self._count = torch.zeros(num_timesteps + 1, dtype=torch.int64, device=self.device)

    def probabilities(self) -> Tensor:
        """p_t, (T,) float64."""
        moments = self._history[:-1].square().mean(1).sqrt()
        p = (1 - self.uniform) * moments / moments.sum() + self.uniform / self.num_timesteps
        # All losses 0 tell no timestep from another.
        known = (self._count[:-1].min() >= self._history.shape[1]) & (moments.sum() > 0)
        return torch.where(known, p, 1 / self.num_timesteps)

    def weights(self, t: Tensor) -> Tensor:
        """Weight 1 / (T p_t) of a loss at t, float32."""
        return (1 / (self.num_timesteps * self.probabilities()[t])).float()

    def update(self, t: Tensor, loss: Tensor, *, largest: int | None = None) -> None:
        """Remember the unweighted losses (B,) at t (B,), those of all processes.

        Under `torch.distributed` every process must call it, and every history stays the same;
        batches may differ in size. Losses that are not finite are left out.

        Parameters
        ----------
        largest
            The largest B of any process. None: they tell each other, which waits for the device.

        Raises
        ------
        ValueError
            Shapes or dtypes that do not fit, or a B above `largest`.
        """
        if t.dim() != 1 or t.shape != loss.shape or t.dtype != torch.int64:
            raise ValueError(
                f"t has shape {tuple(t.shape)} and dtype {t.dtype}, and loss shape "
                f"{tuple(loss.shape)}; expected both (B,), t int64"
            )
        if largest is not None and len(t) > largest:
            raise ValueError(f"largest is {largest}, but this batch has {len(t)} losses")
        t, loss = t.to(self.device), loss.detach().to(self.device, torch.float64)
        t = torch.where(loss.isfinite(), t, self.num_timesteps)
        t, loss = self._of_all_processes(t, loss, largest)
        order = t.argsort(stable=True)
        t, loss = t[order], loss[order]
        place = torch.arange(len(t), device=self.device)
        first, end = torch.searchsorted(t, t), torch.searchsorted(t, t, right=True)
        length = self._history.shape[1]
        slot = (self._count[t] + place - first) % length
        # Of more than fit only the last: two stores to one slot would be in no fixed order.
        row = torch.where(end - place <= length, t, self.num_timesteps)
        self._history[row, slot] = loss
        self._count.index_add_(0, t, torch.ones_like(t))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on exactly."""
        return {
            "history": self._history[:-1].to("cpu", copy=True),
            "count": self._count[:-1].to("cpu", copy=True),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises
        ------
        ValueError
            The state is of another sampler, or of another T or length of history.
        """
        for name, tensor in (("history", self._history[:-1]), ("count", self._count[:-1])):
            shape = tuple(state[name].shape) if name in state else "nothing"
            if shape != tuple(tensor.shape):
                raise ValueError(f"expected a {name} of shape {tuple(tensor.shape)}, got {shape}")
            tensor.copy_(state[name])

    def _draw(self, keys: Tensor) -> Tensor:
        uniform = (keys & ((1 << _KEY_BITS) - 1)).double() * math.ldexp(1, -_KEY_BITS)
        edges = self.probabilities().cumsum(0)
        # Scaled by the sum, which rounding may leave a little off 1.
        t = torch.searchsorted(edges, uniform * edges[-1], right=True)
        return t.clamp(max=self.num_timesteps - 1)

    def _of_all_processes(
        self, t: Tensor, loss: Tensor, largest: int | None
    ) -> tuple[Tensor, Tensor]:
        """Concatenated in the order of ranks; padding goes to row T."""
        if not (dist.is_available() and dist.is_initialized()):
            return t, loss
        world = dist.get_world_size()
        if largest is None:
            size = torch.tensor([len(t)], device=self.device)
            dist.all_reduce(size, dist.ReduceOp.MAX)
            largest = int(size)
        gathered = []
        for values, fill in ((t, self.num_timesteps), (loss, 0.0)):
            padded = torch.full((largest,), fill, dtype=values.dtype, device=self.device)
            padded[: len(values)] = values
            parts = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(parts, padded)
            gathered.append(torch.cat(parts))
        return gathered[0], gathered[1]


TIMESTEP_SAMPLERS: dict[str, type[UniformTimesteps]] = {
    "uniform": UniformTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
}
"""Names that `timestep_sampler` knows."""


def timestep_sampler(
    name: str, num_timesteps: int, device: torch.device | str = "cpu"
) -> UniformTimesteps:
    """The timestep sampler called `name`.

    Raises
    ------
    ValueError
        Unknown name; the message lists the known ones.
    """
    check_name("timestep sampler", name, TIMESTEP_SAMPLERS)
    return TIMESTEP_SAMPLERS[name](num_timesteps, device)
