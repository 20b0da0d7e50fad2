"""How well generated digits read: judged by a classifier that was trained apart, and against the training images."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier

from scorelab.data import digits
from scorelab.evaluation import nearest_distances


def _classifier() -> tuple[MLPClassifier, np.ndarray, np.ndarray]:
    """A classifier that learnt from 1,200 digits, and the other 597 with their labels."""
    data = digits()
    assert data.labels is not None
    pixels, labels = data.reference().flatten(1).numpy(), data.labels.numpy()
    order = np.random.RandomState(0).permutation(len(pixels))
    train, held = order[:1200], order[1200:]
    classifier = MLPClassifier((128,), alpha=1e-2, max_iter=400, random_state=0)
    classifier.fit(pixels[train], labels[train])
    return classifier, pixels[held], labels[held]


def _flat(x: torch.Tensor) -> np.ndarray:
    return x.clamp(-1, 1).flatten(1).double().numpy()


def classify(x: torch.Tensor) -> np.ndarray:
    """The classes that a classifier trained apart sees in images (N, 1, 8, 8)."""
    found: np.ndarray = _classifier()[0].predict(_flat(x))
    return found


def judge(x: torch.Tensor) -> dict[str, float]:
    """Mean confidence, least share of a class, nearest-neighbour distances against train-against-train.

    The classifier learns from 1,200 digits; its accuracy and mean confidence on the other 597 come along.
    """
    data = digits()
    classifier, held, labels = _classifier()
    on_held = classifier.predict_proba(held)
    probabilities = classifier.predict_proba(_flat(x))
    own, _ = nearest_distances(data.reference(), data.reference(), same=True)
    near, _ = nearest_distances(x, data.reference())
    return {
        "confidence": float(probabilities.max(1).mean()),
        "confidence_of_real_digits": float(on_held.max(1).mean()),
        "accuracy_on_real_digits": float((on_held.argmax(1) == labels).mean()),
        "least_share": float(np.bincount(probabilities.argmax(1), minlength=10).min() / len(x)),
        "train_percentile_1": float(own.quantile(0.01)),
        "sample_percentile_1": float(near.quantile(0.01)),
        "share_below": float((near < own.quantile(0.01)).float().mean()),
        "median": float(near.median()),
        "train_median": float(own.median()),
    }
