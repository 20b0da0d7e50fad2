"""How well generated digits read: judged by a classifier that was trained apart, and against the training images."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier

from scorelab.data import digits
from scorelab.evaluation import nearest_distances


def judge(x: torch.Tensor) -> dict[str, float]:
    """Mean confidence, least share of a class, nearest-neighbour distances against train-against-train.

    The classifier learns from 1,200 digits; its accuracy and mean confidence on the other 597 come along.
    """
    data = digits()
    assert data.labels is not None
    pixels, labels = data.reference().flatten(1).numpy(), data.labels.numpy()
    order = np.random.RandomState(0).permutation(len(pixels))
    train, held = order[:1200], order[1200:]
    classifier = MLPClassifier((128,), alpha=1e-2, max_iter=400, random_state=0)
    classifier.fit(pixels[train], labels[train])
    on_held = classifier.predict_proba(pixels[held])
    probabilities = classifier.predict_proba(x.clamp(-1, 1).flatten(1).double().numpy())
    own, _ = nearest_distances(data.reference(), data.reference(), same=True)
    near, _ = nearest_distances(x, data.reference())
    return {
        "confidence": float(probabilities.max(1).mean()),
        "confidence_of_real_digits": float(on_held.max(1).mean()),
        "accuracy_on_real_digits": float((on_held.argmax(1) == labels[held]).mean()),
        "least_share": float(np.bincount(probabilities.argmax(1), minlength=10).min() / len(x)),
        "train_percentile_1": float(own.quantile(0.01)),
        "sample_percentile_1": float(near.quantile(0.01)),
        "share_below": float((near < own.quantile(0.01)).float().mean()),
        "median": float(near.median()),
        "train_median": float(own.median()),
    }
