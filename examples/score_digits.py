"""How good are the digits of a trained run? Three numbers beside those of real digits.

    python -m fastdiff.train
    python examples/score_digits.py runs/digits

The 1,797 real digits are cut into two halves at random. A support vector machine is fitted on one
half; the other, which it has not seen, stands for reality:

- confidence: the mean of the classifier's highest class probability,
- classes: how many images of each digit it sees,
- Frechet distance between raw pixels (64-d), to the held-out half; and, as the floor that two
  finite samples of the same distribution leave, of the two real halves to each other.

Exits with 1 if a goal is missed: confidence >= 0.80, all ten classes, distance <= 2 x the floor.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from fastdiff.evaluation.frechet import frechet_distance
from fastdiff.sample import generate
from fastdiff.samplers import DDIM
from fastdiff.training import load_run
from fastdiff.training.run import use_threads

MIN_CONFIDENCE = 0.80
MAX_DISTANCE_RATIO = 2.0


def main() -> int:
    """Score the run on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="run folder of `python -m fastdiff.train`")
    parser.add_argument("--num", type=int, default=640, help="images to generate")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated images")
    args = parser.parse_args()

    seen, held_out, classifier = real_digits()
    run = load_run(args.run, "cuda" if torch.cuda.is_available() else "cpu")
    use_threads(run.config)
    sampler = DDIM(run.diffusion, steps=args.steps)
    levels = generate(run, sampler, args.num, args.seed).reshape(args.num, 64).numpy()
    generated = levels * (16 / 255)  # the pixels of scikit-learn's digits are 0..16

    rows = [
        score(name, images, reference, classifier)
        for name, images, reference in (
            ("generated", generated, held_out),
            ("real, held out", held_out, seen),
        )
    ]
    print(f"{'':16}{'confidence':>12}{'distance':>10}  images of 0..9")
    for name, confidence, distance, counts in rows:
        print(f"{name:16}{confidence:12.3f}{distance:10.2f}  {' '.join(map(str, counts))}")

    (_, confidence, distance, counts), (_, _, floor, _) = rows
    goals = {
        f"confidence {confidence:.3f} >= {MIN_CONFIDENCE}": confidence >= MIN_CONFIDENCE,
        f"{np.count_nonzero(counts)} of 10 classes": bool(counts.all()),
        f"distance {distance / floor:.2f} x the floor <= {MAX_DISTANCE_RATIO}": (
            distance <= MAX_DISTANCE_RATIO * floor
        ),
    }
    for goal, reached in goals.items():
        print(f"{'reached' if reached else 'MISSED ':8} {goal}")
    return 0 if all(goals.values()) else 1


def real_digits() -> tuple[np.ndarray, np.ndarray, CalibratedClassifierCV]:
    """Return the half a classifier was fitted on, the other half, and the classifier."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    first, second = np.array_split(order, 2)
    # gamma fits pixels of 0..16. Probabilities by Platt scaling on cross-validated scores, what
    # SVC(probability=True) did until scikit-learn deprecated it.
    classifier = CalibratedClassifierCV(SVC(gamma=0.001), ensemble=False)
    classifier.fit(digits.data[first], digits.target[first])
    return digits.data[first], digits.data[second], classifier


def score(
    name: str, images: np.ndarray, reference: np.ndarray, classifier: CalibratedClassifierCV
) -> tuple[str, float, float, np.ndarray]:
    """Return name, mean highest probability, Frechet distance to ``reference``, class counts."""
    probabilities = classifier.predict_proba(images)
    counts = np.bincount(probabilities.argmax(1), minlength=10)
    return name, probabilities.max(1).mean(), frechet_distance(images, reference), counts


if __name__ == "__main__":
    sys.exit(main())
