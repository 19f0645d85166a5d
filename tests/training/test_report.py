"""report.html, read as a browser would."""

import base64
import dataclasses
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.training import RunFolder, TrainConfig, report
from fastdiff.training.distributed import World
from fastdiff.training.meter import Meter


class Page(HTMLParser):
    """What is on a page: pictures by caption, and text."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.text, self.tags = {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if tag == "img":
            kind, data = attrs["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            self.pictures[attrs["alt"]] = Image.open(io.BytesIO(base64.b64decode(data)))
        assert not {"href", "srcset"} & attrs.keys()  # nothing from elsewhere

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "a<b>&c")
    config = dataclasses.replace(TrainConfig(), data="<script>alert(1)</script>", steps=2000)
    run.create(config)
    return run


def entry(step, **more):
    tenths = [None] + [1.0 / step] * 9
    values = {"loss": 1.0 / step, "grad_norm": 2.0, "lr": 1e-3, "images_per_second": 100.0 + step}
    return {"step": step, **values, "memory_mib": 300, "loss_by_timestep": tenths, **more}


def test_it_shows_curves_samples_evaluation_and_settings(folder):
    lines = [json.dumps(entry(step)) for step in range(10, 120, 10)]
    lines.append(lines[-1][:20])  # cut off while it was written
    (folder.path / "metrics.jsonl").write_text("\n".join(lines))
    for step in range(1, 21):
        picture = Image.fromarray(np.full((4, 4), step, np.uint8))
        picture.save(folder.samples / f"step-{step:08d}.png")
    picture.save(folder.samples / "ddim-50-seed-0.png")
    (folder.path / "evaluation").mkdir()
    evaluation = folder.path / "evaluation"
    found = {
        "metric": "bpd",
        "verdict": "worse than <i>",
        "bits_per_dim": 3.2500001,
        "vb": [1, 2],
        "test_images": True,
    }
    (evaluation / "bpd.json").write_text(json.dumps(found))
    found = {"frechet_distance": 0.123456, "real_vs_real": 0.0123456}
    (evaluation / "frechet.json").write_text(json.dumps(found))
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(evaluation / "frechet.png")
    (evaluation / "likelihood.json").write_text('{"cut off": ')
    (evaluation / "own.json").write_text('{"<b>": 7}')
    (evaluation / "list.json").write_text("[1]")

    path = report.write(folder)
    page = Page(path.read_text())
    text = " ".join(page.text)
    assert "a<b>&c" in text
    assert "<script>alert(1)</script>" in text  # as text
    assert "script" not in page.tags
    facts = {"step of 2,000": "110", "images/s (median)": "160", "MiB of memory": "300"}
    facts |= {"bits/dim (bound)": "3.25", "Frechet distance (floor 0.01235)": "0.1235"}
    for name, value in facts.items():
        assert f"{value} {name}" in text
    titles = [t for t in page.text if t in (*report._EVALUATIONS.values(), "own")]
    assert titles == ["Bits/dim: variational bound", "Frechet distance", "own"]
    assert "test_images yes" in text
    assert "<b> 7" in text
    assert "[1, 2]" not in text
    # The verdict, once, before everything else.
    assert text.count("worse than <i>") == 1
    assert text.index("worse than <i>") < text.index("test_images yes") < text.index("step 1 ")
    curves = ["Training loss", "Loss by timestep", "Norm of the gradient", "Learning rate"]
    curves += ["Throughput", "Memory"]
    grids = [f"step {step}" for step in (1, 3, 6, 8, 11, 13, 15, 18, 20)]
    assert list(page.pictures) == ["Samples that were measured", *grids, *curves]
    assert page.pictures["Samples that were measured"].getpixel((0, 0)) == 77
    assert page.pictures["step 20"].getpixel((0, 0)) == 20
    for name in curves:
        red, _, blue = np.moveaxis(np.asarray(page.pictures[name].convert("RGB"), int), -1, 0)
        assert (blue - red > 80).any(), name  # a line is drawn


def test_a_run_of_no_step_has_a_report(folder):
    page = Page(report.write(folder).read_text())
    assert not page.pictures
    assert "No step has been logged yet." in " ".join(page.text)


def test_the_meter_gives_every_step_and_the_mean_loss_of_each_tenth():
    meter = Meter(torch.device("cpu"), 3, timesteps=50)
    one = torch.tensor(1.0)
    for _ in range(2):  # it starts anew
        meter.add(one, 2 * one, 4 * one, torch.tensor([0, 4, 49]), torch.tensor([1.0, 3.0, 5.0]))
        meter.add(3 * one, one, 4 * one, torch.tensor([5, 45, 44]), torch.tensor([7.0, 6.0, 2.0]))
        assert meter.steps == 2
        rows, tenths = meter.read(World())
        assert rows == [[1, 2, 4], [3, 1, 4]]
        assert tenths == [2.0, 7.0, *[None] * 6, 2.0, 5.5]
    meter.add(one, one, one, torch.tensor([0]), torch.tensor([1.0]))
    meter.clear()
    assert meter.read(World()) == ([], [None] * 10)
