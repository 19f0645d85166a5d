"""Features of images for a Frechet distance: of a small classifier, of Inception, or a user's own.

The classifier is trained on the real images: for images whose published Inception features mean
nothing (8x8 digits), and without a download. Distances in the features of different classifiers
cannot be compared with each other, or with published FIDs.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.training.data import Batches, Dataset
from fastdiff.training.errors import UserError, one_line
from fastdiff.training.files import write_atomic

FEATURES = 32
CLASSIFIER_STEPS = 600

# The classifier sees larger images averaged to this size: it has no eye for more.
_LARGEST = 64
_PART = 500  # images at a time


class FeatureClassifier(nn.Module):
    """Three convolutions, the mean over the pixels: features (B, 32), then a linear classifier."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, FEATURES, 3, padding=1),
            nn.Tanh(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, levels: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> (B, 32)."""
        pixels = levels.float() / 127.5 - 1
        if max(pixels.shape[2:]) > _LARGEST:
            height, width = (min(length, _LARGEST) for length in pixels.shape[2:])
            pixels = F.adaptive_avg_pool2d(pixels, (height, width))
        return self.body(pixels).mean((2, 3))

    def forward(self, levels: Tensor) -> Tensor:
        return self.head(self.features(levels))


def train_classifier(
    dataset: Dataset, steps: int, seed: int = 0, device: torch.device | str = "cpu"
) -> FeatureClassifier:
    """Cross entropy on the real images; torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = FeatureClassifier(dataset.shape[2], dataset.num_classes).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches = iter(Batches(dataset, 128, seed=seed))
    for _ in range(steps):
        images, labels = next(batches)
        images, labels = images.to(device), labels.to(device)
        loss = F.cross_entropy(classifier(images.permute(0, 3, 1, 2)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    batches.close()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def features(classifier: FeatureClassifier, levels: Tensor) -> np.ndarray:
    """float64 (N, 32) of uint8 images (N, C, H, W)."""
    return torch.cat([classifier.features(part) for part in levels.split(_PART)]).double().numpy()


@dataclass(frozen=True)
class Extractor:
    """Where features come from.

    Attributes
    ----------
    name : str
        What results call it.
    function : callable
        uint8 (B, C, H, W) on the device -> (B, D), tensor or array.
    facts : dict
        What else results say of it.
    """

    name: str
    function: Callable[[Tensor], Any]
    facts: dict[str, Any]

    @torch.no_grad()
    def of_images(self, levels: Tensor) -> np.ndarray:
        """float64 (N, D) of uint8 images (N, C, H, W)."""
        return np.concatenate([self._checked(part) for part in levels.split(_PART)])

    @torch.no_grad()
    def of_dataset(
        self, dataset: Dataset, indices: np.ndarray, device: torch.device | str
    ) -> np.ndarray:
        """float64 (N, D) of the images with these indices, read part by part."""
        found = []
        for start in range(0, len(indices), _PART):
            images = torch.from_numpy(dataset.read(indices[start : start + _PART]))
            found.append(self._checked(images.permute(0, 3, 1, 2).to(device)))
        return np.concatenate(found)

    def _checked(self, levels: Tensor) -> np.ndarray:
        values = self.function(levels)
        if isinstance(values, Tensor):
            values = values.double().cpu().numpy()
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or len(values) != len(levels):
            raise UserError(
                f"--features {self.name}: gave {values.shape} for {len(levels)} images, expected "
                f"({len(levels)}, D)"
            )
        bad = int((~np.isfinite(values)).any(1).sum())
        if bad:
            raise UserError(
                f"--features {self.name}: gave features that are not finite for {bad} of "
                f"{len(values)} images"
            )
        return values


def extractor(
    name: str,
    dataset: Dataset,
    data: str,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> Extractor:
    """Make what --features names.

    Parameters
    ----------
    name : str
        "classifier": trained on ``dataset`` unless ``folder`` has one that was; "inception": that
        of torchvision with its ImageNet weights, if they are there; "module:function", whose
        function maps uint8 (B, C, H, W) to (B, D); or the .safetensors file of another run's
        classifier.
    dataset, data
        The real images and their name.
    folder : Path
        Where the classifier is kept.
    device : torch.device
        Where features are computed.
    say : callable
        Is told what takes long.

    Raises
    ------
    UserError
        It is none of these, or cannot be had.
    """
    if name == "classifier":
        return _classifier(dataset, data, folder / "features.safetensors", device, say)
    if name == "inception":
        return Extractor(name, _inception(device), {})
    if name.endswith(".safetensors"):
        classifier, facts = _load_classifier(Path(name), device)
        if classifier.body[0].in_channels != dataset.shape[2]:
            raise UserError(
                f"--features {name}: for images of {classifier.body[0].in_channels} channels, "
                f"--data {data} has {dataset.shape[2]}"
            )
        return Extractor(name, classifier.features, facts)
    if ":" in name:
        return Extractor(name, _imported(name), {})
    raise UserError(
        f"--features {name}: give classifier, inception, module:function, or a .safetensors file "
        "that an evaluation of another run has written"
    )


@dataclass(frozen=True)
class _Part:
    """Some images of a dataset."""

    dataset: Dataset
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def labels(self) -> np.ndarray:
        return self.dataset.labels[self.chosen]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.dataset.shape

    @property
    def num_classes(self) -> int:
        return self.dataset.num_classes

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.dataset.read(self.chosen[indices])


def _classifier(dataset, data, path, device, say) -> Extractor:
    """The classifier in ``path``; if that is of other images or absent, a new one, kept there."""
    if dataset.num_classes < 2:
        raise UserError(
            f"--features classifier is trained on images with classes, and --data {data} has none; "
            "give --features module:function, or inception"
        )
    facts = {
        "data": data,
        "shape": list(dataset.shape),
        "num_classes": dataset.num_classes,
        "steps": CLASSIFIER_STEPS,
    }
    if path.is_file():
        classifier, found = _load_classifier(path, device)
        if facts.items() <= found.items():
            return Extractor("classifier", classifier.features, found)
    say(f"training the classifier for features on {data} (once, kept in {path})")
    # A tenth is kept back, to tell how well it classifies.
    order = np.random.default_rng(0).permutation(len(dataset))
    tenth = -(-len(dataset) // 10)
    classifier = train_classifier(_Part(dataset, order[tenth:]), CLASSIFIER_STEPS, device=device)
    logits = Extractor("classifier", classifier, {}).of_dataset(dataset, order[:tenth], device)
    right = logits.argmax(1) == dataset.labels[order[:tenth]]
    facts |= {"num_images": len(dataset), "accuracy": float(right.mean())}
    _save_classifier(path, classifier, facts)
    return Extractor("classifier", classifier.features, facts)


def _save_classifier(path: Path, classifier: FeatureClassifier, facts: dict[str, Any]) -> None:
    import safetensors.torch

    weights = {name: value.contiguous().cpu() for name, value in classifier.state_dict().items()}
    write_atomic(path, safetensors.torch.save(weights, {"facts": json.dumps(facts)}))


def _load_classifier(path: Path, device) -> tuple[FeatureClassifier, dict[str, Any]]:
    import safetensors

    # To open a pipe would wait for somebody to write to it.
    if path.exists() and not path.is_file():
        raise UserError(f"--features: {path} is a folder, a pipe or a device, not a file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        classifier = FeatureClassifier(facts["shape"][2], facts["num_classes"])
        classifier.load_state_dict(weights)
    except Exception as error:
        # Missing, another file, damaged: what safetensors and torch raise is not documented.
        raise UserError(
            f"--features: {path} holds no classifier of features: {one_line(error)}"
        ) from error
    return classifier.eval().requires_grad_(False).to(device), facts


def _inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    """The 2048 features before torchvision's classifier (its weights are not those of FIDs)."""
    try:
        from torchvision.models import Inception_V3_Weights, inception_v3
    except ModuleNotFoundError as error:
        raise UserError(
            "--features inception needs torchvision; install it with: pip install torchvision"
        ) from error
    url = Inception_V3_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        raise UserError(f"--features inception: its weights are not there; fetch {url} to {path}")
    net = inception_v3(weights=None, init_weights=False)
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"--features inception: cannot read {path}: {one_line(error)}") from error
    net.fc = nn.Identity()
    net.eval().requires_grad_(False).to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def function(levels: Tensor) -> Tensor:
        found = []
        for part in levels.split(50):  # at 299x299 they are large
            pixels = part[:, :3].float() / 255
            pixels = F.interpolate(pixels, (299, 299), mode="bilinear", antialias=True)
            found.append(net((pixels - mean) / deviation))
        return torch.cat(found)

    return function


def _imported(name: str) -> Callable[[Tensor], Any]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--features {name}: cannot import it: {one_line(error)}") from error
    if not callable(function):
        raise UserError(f"--features {name}: is not a function")
    return function
