"""DDPM in 60 lines: two fused ops around any network. The noise is never in memory.

python examples/minimal_training.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastdiff
from fastdiff import ops


class Net(nn.Module):
    """Any network that maps (x_t, t) to a prediction of the noise will do."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, width)
        self.inside, self.outside = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 1)
        self.norm, self.conv = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict the noise in x_t."""
        h, norm = self.inside(x_t), self.norm
        h = h + self.conv(
            ops.group_norm_silu(h, 8, norm.weight, norm.bias, channel_bias=self.time(t))
        )
        return self.outside(nn.functional.silu(h))


def main() -> list[float]:
    """Train, and return the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] * (255 / 16)).to(torch.uint8)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    tables = fastdiff.NoiseSchedule.linear(1000).tables("cpu")
    losses = []
    for step in range(args.steps):
        x0 = images[torch.randint(len(images), (64,))]
        t = torch.randint(1000, (64,))
        # uint8 pixels are scaled to [-1, 1], and the noise is made, inside the kernel.
        x_t = ops.q_sample(x0, t, tables.sqrt_alpha_bar, tables.sqrt_one_minus_alpha_bar, seed=step)
        loss = ops.eps_loss(net(x_t, t), seed=step)  # makes the same noise again
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {sum(losses[-20:]) / len(losses[-20:]):.3f}")
    return losses


if __name__ == "__main__":
    main()
