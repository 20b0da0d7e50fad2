"""How well generated digits read: judged by a classifier that was trained apart, and against the training images."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.svm import SVC

from scorelab.data import digits
from scorelab.evaluation import nearest_distances


def judge(x: torch.Tensor) -> dict[str, object]:
    """Mean confidence, shares of the classes, and nearest-neighbour distances against train-against-train."""
    data = digits()
    assert data.labels is not None
    classifier = SVC(probability=True, C=10, gamma="scale", random_state=0)
    classifier.fit(data.x0.flatten(1).numpy(), data.labels.numpy())
    probabilities = classifier.predict_proba(x.clamp(-1, 1).flatten(1).numpy())
    own, _ = nearest_distances(data.x0, data.x0, same=True)
    near, _ = nearest_distances(x, data.x0)
    return {
        "confidence": float(probabilities.max(1).mean()),
        "least_share": float(np.bincount(probabilities.argmax(1), minlength=10).min() / len(x)),
        "train_percentile_1": float(own.quantile(0.01)),
        "sample_percentile_1": float(near.quantile(0.01)),
        "share_below": float((near < own.quantile(0.01)).float().mean()),
        "median": (float(near.median()), float(own.median())),
    }
