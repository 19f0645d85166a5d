"""benchmarks.ddim_tables: what it calls a trend, and a run that is interrupted and goes on."""

import copy
import json

import numpy as np
import pytest

from benchmarks import ddim_tables
from benchmarks.ddim_report import (
    ETAS,
    PUBLISHED_FID,
    PUBLISHED_RECONSTRUCTION,
    PUBLISHED_STEPS,
    verdicts,
)


def _published():
    quality = {eta: dict(zip(PUBLISHED_STEPS, PUBLISHED_FID[eta], strict=True)) for eta in ETAS}
    errors = {S: e for S, e in PUBLISHED_RECONSTRUCTION.items() if S < 1000}  # 500 and 1000 tie
    return {"quality": quality, "reconstruction": errors}


def test_the_published_numbers_show_every_trend():
    found = verdicts(_published())
    assert len(found) == 9
    assert all(agrees for agrees, _ in found), found


@pytest.mark.parametrize(
    ("table", "row", "S", "value", "lost"),
    [
        ("quality", "0.5", 10, 1.0, "eta = 0 is the best at S = 10"),
        ("quality", "1", 20, 500.0, "sigma_hat is the worst at S = 20"),
        ("quality", "0.2", 10, 20.0, "at S = 10 the distance rises with eta"),
        ("quality", "0", 50, 10.0, "eta = 0: the distance falls with S"),
        ("quality", "sigma_hat", 1000, 5.0, "at S = 1000 sigma_hat is better than eta = 0"),
        ("reconstruction", None, 100, 1.0, "the reconstruction error falls with S"),
    ],
)
def test_a_trend_that_is_not_there_is_told(table, row, S, value, lost):
    results = copy.deepcopy(_published())
    (results[table] if row is None else results[table][row])[S] = value
    assert (False, lost) in verdicts(results)


def test_cells_that_were_not_computed_are_left_out():
    results = _published()
    for eta in ("0.2", "0.5", "1"):
        results["quality"][eta][1000] = None
    assert all(agrees for agrees, _ in verdicts(results))
    for eta in ETAS:
        del results["quality"][eta][1000]
    assert len(verdicts(results)) == 8


def test_fashion_mnist_is_averaged_to_half_its_size(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    stored = ddim_tables.ArrayDataset(images, np.arange(3), ("a", "b", "c"))
    monkeypatch.setattr(ddim_tables, "load_dataset", lambda data, folder: stored)
    name, half = ddim_tables.load_images("fashion-mnist", "anywhere", False)
    assert name == "fashion-mnist"
    assert half.shape == (14, 14, 1)
    assert half.images[1, 3, 5, 0] == round(float(images[1, 6:8, 10:12].mean()))
    # --quick means digits unless another set is asked for.
    assert ddim_tables.load_images(None, "anywhere", True)[0] == "digits"


@pytest.mark.slow
def test_an_interrupted_run_goes_on(monkeypatch, tmp_path, capsys):
    plan = ddim_tables.Plan(4, 40, (10, 20), ("0",), 4, (10, 20))
    monkeypatch.setattr(ddim_tables, "QUICK", plan)
    argv = ["--quick", "--out", str(tmp_path), "--workers", "1"]
    assert ddim_tables.main(argv) == 0
    first = json.loads((tmp_path / "tables.json").read_text())
    assert len(list((tmp_path / "cells").iterdir())) == 13
    for name in ("quality-eta-0-S-20.json", "reconstruction-eta-0-S-10.json"):
        (tmp_path / "cells" / name).unlink()
    capsys.readouterr()
    assert ddim_tables.main(argv) == 0
    assert "2 of 13 cells to compute" in capsys.readouterr().err
    again = json.loads((tmp_path / "tables.json").read_text())
    assert again["quality"] == first["quality"]
    assert again["reconstruction"] == first["reconstruction"]
    assert "| sigma_hat |" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "tables.png").stat().st_size > 10_000
