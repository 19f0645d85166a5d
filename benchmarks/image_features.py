"""Features for a Frechet distance between sets of images: those of a small classifier.

The classifier is trained on the real images by `train_classifier`: for images whose published
Inception features mean nothing (8x8 digits), and without a download. Distances of different
classifiers cannot be compared with each other, or with published FIDs.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.training.data import Batches, Dataset

FEATURES = 32


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
        return self.body(levels.float() / 127.5 - 1).mean((2, 3))

    def forward(self, levels: Tensor) -> Tensor:
        return self.head(self.features(levels))


def train_classifier(dataset: Dataset, steps: int, seed: int = 0) -> FeatureClassifier:
    """Cross entropy on the real images."""
    torch.manual_seed(seed)
    classifier = FeatureClassifier(dataset.shape[2], dataset.num_classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches = iter(Batches(dataset, 128, seed=seed))
    for _ in range(steps):
        images, labels = next(batches)
        loss = F.cross_entropy(classifier(images.permute(0, 3, 1, 2)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def features(classifier: FeatureClassifier, levels: Tensor) -> np.ndarray:
    """float64 (N, 32) of uint8 images (N, C, H, W)."""
    return torch.cat([classifier.features(part) for part in levels.split(500)]).double().numpy()
