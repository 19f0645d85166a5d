"""DDIM's Tables 1 and 2 in small: sample quality by S and eta, reconstruction error by S.

    python -m benchmarks.ddim_tables            # fashion-mnist if it is there, else digits
    python -m benchmarks.ddim_tables --quick    # digits, fewer images and steps
    python -m benchmarks.ddim_tables --data fashion-mnist --data-dir FOLDER_OF_IDX_FILES

Trains one U-Net and one classifier, then writes tables.md, tables.json and tables.png into --out:

- Table 1: Frechet distance to the real images in the features of the classifier, for S of the
  1,000 timesteps (quadratic spacing, as DDIM's for CIFAR-10) and eta = 0, 0.2, 0.5, 1 and
  sigma_hat. Every cell starts from the same noise. `real`: as many real images in their place.
- Table 2: mean squared error per dimension of decode(encode(x0)), pixels scaled to [0, 1].

Fashion-MNIST (Debian: apt-get install dataset-fashion-mnist) is averaged to 14x14, so that all of
it fits into 40 minutes on 2 cores; S = 1000 only for eta = 0 and sigma_hat. Interrupted, it goes on
where it stopped: what was done before is in --out and is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.ddim_report import ETAS, verdicts, write_report
from fastdiff.evaluation.features import FeatureClassifier, features, train_classifier
from fastdiff.evaluation.frechet import frechet_distance
from fastdiff.images import image_grid, to_uint8
from fastdiff.samplers import DDIM
from fastdiff.training import RunFolder, TrainConfig, TrainedRun, Trainer, UserError, load_run
from fastdiff.training.data import ArrayDataset, has_files, load_dataset
from fastdiff.training.files import write_atomic
from fastdiff.training.run import newest_checkpoint


@dataclass(frozen=True)
class Plan:
    """How much is computed."""

    train_steps: int
    num: int  # images per cell of Table 1
    quality_steps: tuple[int, ...]  # S of Table 1
    full_etas: tuple[str, ...]  # rows that also get S = 1000
    reconstructed: int  # images of Table 2
    reconstruction_steps: tuple[int, ...]


QUICK = Plan(500, 300, (10, 20, 50), (), 50, (10, 20, 50, 100))
FULL = {
    "digits": Plan(1500, 500, (10, 20, 50, 100), ("0", "sigma_hat"), 100, (10, 20, 50, 100, 500)),
    "fashion-mnist": Plan(
        1500, 500, (10, 20, 50, 100), ("0", "sigma_hat"), 50, (10, 20, 50, 100, 500)
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Compute what is missing, write the report, print where the trends agree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=sorted(FULL), help="default: fashion-mnist if present")
    parser.add_argument("--data-dir", help="folder of fashion-mnist's IDX files")
    parser.add_argument("--quick", action="store_true", help="under 5 minutes on 2 cores")
    parser.add_argument("--out", type=pathlib.Path, help="default: runs/ddim_tables/DATA[-quick]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # of this and of each worker: the images are too small to share
    try:
        data, dataset = load_images(args.data, args.data_dir, args.quick)
    except UserError as error:
        print(f"python -m benchmarks.ddim_tables: error: {error}", file=sys.stderr)
        return 2
    plan = QUICK if args.quick else FULL[data]
    out = args.out or pathlib.Path("runs/ddim_tables") / (data + "-quick" * args.quick)
    started = time.perf_counter()
    prepare(out, data, dataset, plan)
    done = compute_cells(out, dataset, plan, args.workers)
    results = summarize(out, data, dataset, plan, done)
    results["minutes_of_this_call"] = round((time.perf_counter() - started) / 60, 1)
    write_report(out, results)
    for agrees, statement in verdicts(results):
        print(f"{'agrees' if agrees else 'DIFFERS':8} {statement}")
    print(f"written: {out}/tables.md, tables.json, tables.png, samples-*.png")
    return 0


def load_images(data: str | None, folder: str | None, quick: bool) -> tuple[str, ArrayDataset]:
    """The dataset and its name; Fashion-MNIST averaged to 14x14."""
    if data is None:
        present = not quick and (folder is not None or has_files("fashion-mnist"))
        data = "fashion-mnist" if present else "digits"
    dataset = load_dataset(data, folder)
    if data == "digits":
        return data, dataset
    N, H, W, C = dataset.images.shape
    blocks = dataset.images.reshape(N, H // 2, 2, W // 2, 2, C).astype(np.float32)
    return data, ArrayDataset(
        blocks.mean((2, 4)).round().astype(np.uint8), dataset.labels, dataset.classes
    )


def prepare(out: pathlib.Path, data: str, dataset: ArrayDataset, plan: Plan) -> None:
    """Train what is not trained yet: the U-Net from its newest checkpoint, and the classifier."""
    config = TrainConfig(
        data=data,
        schedule="linear",
        steps=plan.train_steps,
        ema=0.995,
        device="cpu",
        sample_every=10**9,
        checkpoint_every=250,
        num_samples=16,
        out=str(out / "run"),
    )
    run = RunFolder(out / "run")
    checkpoint = newest_checkpoint(run, warn=print) if run.config.exists() else None
    if checkpoint is None or checkpoint.step < plan.train_steps:
        trainer = Trainer(config, dataset, run, torch.device("cpu"))
        if checkpoint is None:
            run.create(config)
        else:
            trainer.restore(checkpoint)
        trainer.train()
    path = out / "classifier.pt"
    if not path.exists():
        classifier = train_classifier(dataset, steps=600)
        torch.save(classifier.state_dict(), path)


def compute_cells(
    out: pathlib.Path, dataset: ArrayDataset, plan: Plan, workers: int
) -> dict[str, float]:
    """All cells, computed by `workers` processes; each is a file in OUT/cells once it is done."""
    folder = out / "cells"
    folder.mkdir(exist_ok=True)
    cells = [("quality", eta, S) for S in plan.quality_steps for eta in ETAS]
    cells += [("quality", eta, 1000) for eta in plan.full_etas]
    cells += [("reconstruction", "0", S) for S in plan.reconstruction_steps]
    cells.sort(key=lambda cell: -cell[2])  # the longest first, so that workers end together
    missing = [cell for cell in cells if not (folder / _name(cell)).exists()]
    print(f"{len(missing)} of {len(cells)} cells to compute", file=sys.stderr)
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (out, dataset, plan)) as pool:
        futures = {pool.submit(_compute, cell): cell for cell in missing}
        for future in as_completed(futures):
            name = _name(futures[future])
            write_atomic(folder / name, report.to_json(future.result()).encode())
            print(f"{name.removesuffix('.json'):32} {future.result():.6g}", file=sys.stderr)
    return {_name(cell): json.loads((folder / _name(cell)).read_text()) for cell in cells}


def _name(cell: tuple[str, str, int]) -> str:
    kind, eta, S = cell
    return f"{kind}-eta-{eta}-S-{S}.json"


@dataclass(frozen=True)
class Worker:
    """What every cell needs, loaded once per process."""

    out: pathlib.Path
    run: TrainedRun
    classifier: FeatureClassifier
    real: torch.Tensor  # uint8 (N, C, H, W)
    plan: Plan


_worker: Worker | None = None


def _start_worker(out: pathlib.Path, dataset: ArrayDataset, plan: Plan) -> None:
    global _worker
    torch.set_num_threads(1)
    real = torch.from_numpy(dataset.images).permute(0, 3, 1, 2)
    _worker = Worker(out, load_run(out / "run"), load_classifier(out, dataset), real, plan)


def load_classifier(out: pathlib.Path, dataset: ArrayDataset) -> FeatureClassifier:
    """The classifier that `prepare` trained."""
    classifier = FeatureClassifier(dataset.shape[2], dataset.num_classes)
    classifier.load_state_dict(torch.load(out / "classifier.pt", weights_only=True))
    return classifier.eval().requires_grad_(False)


def _compute(cell: tuple[str, str, int]) -> float:
    kind, eta, S = cell
    return quality(_worker, eta, S) if kind == "quality" else reconstruction(_worker, S)


def quality(worker: Worker, eta: str, S: int) -> float:
    """Frechet distance of `num` samples to the real images."""
    options = {"sigma_hat": True} if eta == "sigma_hat" else {"eta": float(eta)}
    sampler = DDIM(worker.run.diffusion, S, spacing="quadratic", **options)
    shape = (worker.plan.num, *worker.run.image_shape)
    levels = to_uint8(sampler.sample(worker.run.unet, shape, seed=0, progress=False))
    if min(worker.plan.quality_steps) == S:
        image_grid(levels[:20], columns=20).save(worker.out / f"samples-eta-{eta}-S-{S}.png")
    real = features(worker.classifier, worker.real)
    return frechet_distance(features(worker.classifier, levels), real)


def reconstruction(worker: Worker, S: int) -> float:
    """Mean squared error per dimension, for pixels in [0, 1] as in DDIM §5.4."""
    x0 = worker.real[: worker.plan.reconstructed].float() / 127.5 - 1
    # Over the whole time, so that x_T is noise: the quadratic spacing stops at 0.8 T.
    sampler = DDIM(worker.run.diffusion, S, spacing="trailing", clip_denoised=False)
    x_T = sampler.encode(worker.run.unet, x0, progress=False)
    back = sampler.decode(worker.run.unet, x_T, progress=False)
    return float(((back - x0) / 2).square().mean())


def summarize(
    out: pathlib.Path, data: str, dataset: ArrayDataset, plan: Plan, cells: dict[str, float]
) -> dict[str, Any]:
    """The tables as numbers, with the distance that as many real images have to all of them."""
    classifier = load_classifier(out, dataset)
    real = torch.from_numpy(dataset.images).permute(0, 3, 1, 2)
    rows = features(classifier, real)
    picked = np.random.default_rng(0).permutation(len(rows))[: plan.num]
    accuracy = float(
        (classifier(real[:2000]).argmax(1).numpy() == np.asarray(dataset.labels[:2000])).mean()
    )
    steps = [*plan.quality_steps, *([1000] if plan.full_etas else [])]
    return {
        "data": data,
        "plan": asdict(plan),
        "classifier_accuracy": accuracy,
        "real": frechet_distance(rows[picked], rows),
        "quality": {eta: {S: cells.get(_name(("quality", eta, S))) for S in steps} for eta in ETAS},
        "reconstruction": {
            S: cells[_name(("reconstruction", "0", S))] for S in plan.reconstruction_steps
        },
    }


if __name__ == "__main__":
    sys.exit(main())
