"""Losses and gradient norms kept on the device until a log interval ends, then read at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.training.distributed import World

# Parts of the timesteps whose losses are logged apart.
TENTHS = 10


class Meter:
    """What happened in the steps since it was last read.

    Parameters
    ----------
    device : torch.device
        Where losses are.
    most : int
        Largest number of steps between two readings.
    timesteps : int
        T.

    Attributes
    ----------
    steps : int
        Steps added since the last reading.
    """

    def __init__(self, device: torch.device, most: int, timesteps: int) -> None:
        self.timesteps = timesteps
        self.steps = 0
        self._rows = torch.zeros(most, 3, device=device)
        self._tenths = torch.zeros(2, TENTHS, device=device)

    def add(self, loss: Tensor, norm: Tensor, scale: Tensor, t: Tensor, losses: Tensor) -> None:
        """Add a step: its loss, gradient norm and loss scale, and losses (B,) at t (B,)."""
        self._rows[self.steps] = torch.stack((loss, norm, scale))
        counted = torch.stack((losses.float(), torch.ones_like(losses, dtype=torch.float32)))
        self._tenths.index_add_(1, t * TENTHS // self.timesteps, counted)
        self.steps += 1

    def peek(self, world: World) -> tuple[list[list[float]], list[float | None]]:
        """Wait for the device; give (loss, norm, scale) of every step, averaged over processes.

        And the mean loss of each tenth of the timesteps; None where no t was drawn.
        """
        rows = self._rows[: self.steps].flatten()
        values = world.mean(torch.cat((rows, self._tenths.flatten()))).tolist()
        rows = [values[i : i + 3] for i in range(0, 3 * self.steps, 3)]
        sums, counts = values[-2 * TENTHS : -TENTHS], values[-TENTHS:]
        return rows, [s / n if n else None for s, n in zip(sums, counts, strict=True)]

    def read(self, world: World) -> tuple[list[list[float]], list[float | None]]:
        """The same, and start anew."""
        found = self.peek(world)
        self.clear()
        return found

    def state(self, world: World) -> list[Tensor]:
        """The steps since the last reading, of each process; all processes must call it."""
        return world.gather(
            torch.cat((self._rows[: self.steps].flatten(), self._tenths.flatten())).cpu()
        )

    def restore(self, state: list[Tensor], rank: int) -> None:
        """Go on from `state`; where that was of fewer processes, from their mean.

        Raises
        ------
        ValueError
            It is none.
        """
        mine = state[rank] if rank < len(state) else torch.stack(state).mean(0)
        rows = mine[: -self._tenths.numel()]
        if mine.dim() != 1 or rows.numel() % 3 or mine.numel() < self._tenths.numel():
            raise ValueError(f"unknown log entry of shape {tuple(mine.shape)}")
        self.steps = rows.numel() // 3
        # --log-every may be less than it was.
        self._rows = torch.cat((rows.view(-1, 3).to(self._rows), self._rows))
        self._tenths.copy_(mine[-self._tenths.numel() :].view_as(self._tenths))

    def clear(self) -> None:
        """Forget the steps since the last reading."""
        self.steps = 0
        self._tenths.zero_()
