"""The sinusoidal embedding of the timestep."""

import math

import pytest
import torch

from fastdiff.nn.embedding import timestep_embedding


@pytest.mark.parametrize("kind", ["ddpm", "openai"])
def test_equals_the_formula(kind):
    times, dim = [0.0, 1.0, 17.5, 999.0], 12
    half = dim // 2
    rows = []
    for t in times:
        angles = [
            t * math.exp(-math.log(10000) * k / (half - 1 if kind == "ddpm" else half))
            for k in range(half)
        ]
        sin, cos = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        rows.append(sin + cos if kind == "ddpm" else cos + sin)
    expected = torch.tensor(rows, dtype=torch.float64)
    t = torch.tensor(times)
    exact = timestep_embedding(t, dim, kind, torch.float64)
    # Angles reach 999: their rounding is 999 epsilon, and the sine passes it on.
    torch.testing.assert_close(exact, expected, rtol=0, atol=4 * 999 * 2**-53)
    single = timestep_embedding(t, dim, kind)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=4 * 999 * 2**-24)


def test_bad_arguments():
    with pytest.raises(ValueError, match="kind must be one of ddpm, openai, got 'nerf'"):
        timestep_embedding(torch.zeros(1), 8, "nerf")
    with pytest.raises(ValueError, match="dim must be even and at least 4, got 7"):
        timestep_embedding(torch.zeros(1), 7)
