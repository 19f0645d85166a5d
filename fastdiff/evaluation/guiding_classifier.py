"""The classifier of noisy images that classifier guidance needs (CG §4, Math §7), kept in a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.gaussian import GaussianDiffusion
from fastdiff.nn import NoisyClassifier
from fastdiff.training.data import Batches, Dataset
from fastdiff.training.errors import UserError, one_line
from fastdiff.training.files import write_atomic
from fastdiff.training.trained import TrainedRun

STEPS = 400
_BATCH = 64


def guiding_classifier(
    run: TrainedRun,
    folder: Path,
    load: Callable[[], Dataset],
    device: torch.device,
    say: Callable[[str], None],
) -> NoisyClassifier:
    """The classifier in ``folder``; if there is none of this run's process, train one and keep it.

    Parameters
    ----------
    run
        Its U-Net's way down is the classifier's shape, its process makes the noise.
    folder
        Where classifier.safetensors is kept.
    load
        Gives the run's images; called only to train.
    device
        Where it is trained and used.
    say
        Is told what takes long.

    Raises
    ------
    UserError
        The images have no classes.
    """
    path = folder / "classifier.safetensors"
    config = run.config
    facts = {"schedule": config.schedule, "timesteps": config.timesteps, "data": config.data}
    if path.is_file():
        found = _load(path, run, facts, device)
        if found is not None:
            return found
    dataset = load()
    if dataset.num_classes < 2:
        raise UserError(
            f"classifier guidance needs images with classes, and --data {config.data} has none"
        )
    say(f"training a classifier of noisy images (once, {STEPS} steps, kept in {path})")
    classifier = train(run, dataset, device)
    _save(path, classifier, {**facts, "num_classes": dataset.num_classes})
    return classifier


def train(
    run: TrainedRun, dataset: Dataset, device: torch.device, steps: int = STEPS
) -> NoisyClassifier:
    """Cross entropy at x_t ~ q(x_t | x0), t uniform (CG §4); torch's random state is left alone."""
    diffusion: GaussianDiffusion = run.diffusion
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = NoisyClassifier(_half(run), dataset.num_classes).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    source = Batches(dataset, min(_BATCH, len(dataset)), seed=1)
    batches = iter(source)
    for step in range(steps):
        images, y = next(batches)
        x0 = images.permute(0, 3, 1, 2).contiguous().to(device)
        t = torch.randint(diffusion.num_timesteps, y.shape, generator=generator).to(device)
        x_t = diffusion.q_sample(x0, t, seed=step)
        loss = F.cross_entropy(classifier(x_t, t), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    batches.close()
    return classifier.eval().requires_grad_(False)


def _half(run: TrainedRun):
    """The U-Net's shape without what a classifier has no use for."""
    return run.unet.config.replace(
        num_classes=None, null_class=False, self_conditioning=False, learned_variance=False
    )


def _save(path: Path, classifier: NoisyClassifier, facts: dict) -> None:
    import safetensors.torch

    weights = {name: value.contiguous().cpu() for name, value in classifier.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, safetensors.torch.save(weights, {"facts": json.dumps(facts)}))


def _load(path: Path, run: TrainedRun, facts: dict, device: torch.device) -> NoisyClassifier | None:
    """The classifier of a file, None if it is one for another process."""
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            found = json.loads(file.metadata()["facts"])
            if not facts.items() <= found.items():
                return None
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        classifier = NoisyClassifier(_half(run), int(found["num_classes"]))
        classifier.load_state_dict(weights)
    except Exception as error:
        # Damaged, or of another U-Net: what safetensors and torch raise is not documented.
        raise UserError(
            f"{path} holds no classifier for this run: {one_line(error)}; delete it"
        ) from error
    return classifier.eval().requires_grad_(False).to(device)
