"""Each example runs in a small mode, and does what its first line says."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import train

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch, name, *arguments):
    """What main() of an example returns."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return load(name).main()


def test_patch_diffusers(monkeypatch, capsys):
    run(monkeypatch, "patch_diffusers", "--channels", 32, "--batch", 1, "--repeats", 1)
    printed = capsys.readouterr().out
    assert "51 normalizations replaced, 0 left" in printed
    assert float(re.search(r"difference  (\S+),", printed)[1]) < 1e-5


def test_train_diffusers(monkeypatch, tmp_path):
    loss = run(monkeypatch, "train_diffusers", "--steps", 60, "--batch", 32, "--out", tmp_path)
    assert loss < 0.6
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]  # loads without fastdiff
    assert index["unet"] == ["diffusers", "UNet2DModel"]


def test_minimal_training(monkeypatch):
    losses = run(monkeypatch, "minimal_training", "--steps", 60)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    source = (ROOT / "examples/minimal_training.py").read_text()
    assert len(source.rstrip().splitlines()) <= 66


def test_guided_sampling(monkeypatch):
    options = "--steps", 4, "--channels", 8
    images = run(monkeypatch, "guided_sampling", *options)
    assert images.shape == (10, 1, 8, 8)
    assert images.isfinite().all()
    assert not torch.equal(run(monkeypatch, "guided_sampling", *options, "--guidance", 0), images)


def sampled_by_diffusers(folder, num, steps):
    """Pixels (num, 64) in 0..1 from FOLDER/run, in a process that never imports fastdiff."""
    example = ROOT / "examples/load_in_diffusers.py"
    code = (
        f"import runpy, sys; sys.argv = ['x', 'run', '--num', '{num}', '--steps', '{steps}']; "
        f"runpy.run_path({str(example)!r}, run_name='__main__'); "
        "assert 'fastdiff' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    row = np.asarray(Image.open(folder / "samples.png").convert("L"))
    return row.reshape(8, num, 8).swapaxes(0, 1).reshape(num, 64) / 255


def test_load_our_run_into_diffusers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train.main(["--steps", "3", "--sample-every", "9", "--checkpoint-every", "9", "--out", "run"])
    assert sampled_by_diffusers(tmp_path, 2, 3).std() > 0.1


@pytest.mark.slow
def test_what_diffusers_draws_from_our_run_are_digits(monkeypatch, tmp_path):
    """A classifier of real digits is sure of them, and sees every class."""
    monkeypatch.chdir(tmp_path)
    train.main(["--out", "run"])
    images = sampled_by_diffusers(tmp_path, 100, 100)
    score_digits = load("score_digits")
    _, real, classifier = score_digits.real_digits()
    _, confidence, _, counts = score_digits.score("diffusers", 16 * images, real, classifier)
    print(f"confidence {confidence:.3f}, classes {counts}")
    assert confidence >= score_digits.MIN_CONFIDENCE
    assert counts.all()
