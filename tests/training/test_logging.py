import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.images import image_grid, to_uint8
from fastdiff.training.logging import Metrics


def test_to_uint8_inverts_the_scaling_of_all_levels():
    levels = torch.arange(256)
    pixels = (2 * levels.float() - 255) / 255
    assert torch.equal(to_uint8(pixels), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_image_grid_puts_every_image_in_its_place():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 8, 16) * 40
    grid = image_grid(images, columns=3)
    zoom, border = 2, 2  # 16 pixels are enlarged to 32
    assert grid.mode == "L"
    assert grid.size == (3 * (32 + border) + border, 2 * (16 + border) + border)
    pixels = np.asarray(grid)
    for k in range(5):
        row, column = divmod(k, 3)
        top = border + row * (8 * zoom + border)
        left = border + column * (16 * zoom + border)
        assert (pixels[top : top + 16, left : left + 32] == 40 * k).all()
    assert (pixels[top : top + 16, left + 32 + border : left + 64] == 255).all()  # no image 5

    colours = torch.tensor([[200, 100, 50]], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert image_grid(colours.expand(1, 3, 40, 40)).getpixel((5, 5)) == (200, 100, 50)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_images_are_shown_on_white(mode):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 40, 40, len(mode)), dtype=np.uint8)
    expected = Image.fromarray(pixels[0], mode).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", (40, 40), "white"), expected)
    grid = image_grid(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert grid.mode == mode[:-1]
    shown = np.asarray(grid.crop((2, 2, 42, 42)).convert("RGB"), int)
    # Pillow mixes in integers.
    assert np.abs(shown - np.asarray(expected)[..., :3]).max() <= 1
    many = torch.arange(5, dtype=torch.uint8).reshape(1, 5, 1, 1).expand(1, 5, 40, 40) + 9
    assert image_grid(many).getpixel((5, 5)) == 9  # of what has no colours, the first channel


def test_metrics_of_a_resumed_run_read_as_if_it_had_never_stopped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, last_step=0)
    for step in (10, 20, 30):
        metrics.write(step=step, loss=1 / step)
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    resumed = Metrics(path, last_step=20)
    resumed.write(step=30, loss=0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == resumed.entries
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] == 0.5


def test_the_loss_curve_shows_the_losses(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", last_step=0)
    metrics.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    for step in range(1, 100):
        metrics.write(step=step, loss=1 / step)
    metrics.plot(tmp_path / "loss.png")
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
    blue = (picture[..., 2] - picture[..., 0] > 50) & (picture.max(-1) > 100)
    rows, columns = np.nonzero(blue)
    # A falling curve: the left quarter of its pixels lies above the right quarter.
    quarter = np.quantile(columns, [0.25, 0.75])
    assert rows[columns <= quarter[0]].mean() < rows[columns >= quarter[1]].mean() - 20
