"""What samples of small images are worth beside the data, and whether they are of the class that was asked for.

The judge of classes is a network of one hidden layer (scikit-learn) that learnt from training images.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier

from scorelab.data import Files, load
from scorelab.evaluation import nearest_distances
from scorelab.typing import Tensor


@functools.cache
def known(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, MLPClassifier]:
    """Images and labels that the judge learnt from, those that it did not, and the judge."""
    data = load(name, Files("", (), False, False, False, False, "", "white", ""))
    images, labels = data.take(torch.arange(len(data))).flatten(1), data.labels
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    seen, held = order[: min(20_000, len(order) * 2 // 3)], order[-min(5000, len(order) // 3) :]
    judge = MLPClassifier((128,), alpha=1e-2, max_iter=100, early_stopping=True, random_state=0)
    judge.fit(images[seen].numpy(), labels[seen].numpy())
    return images, labels, seen, held, judge


def worth(name: str, x: Tensor, asked: Tensor | None) -> dict[str, float]:
    """What samples (N, D) in [-1, 1] are worth beside images, by class if they were asked for one."""
    images, labels, seen, held, judge = known(name)
    near, _ = nearest_distances(x, images)
    own, _ = nearest_distances(images[seen[:1000]], images[held])
    right = {}
    if asked is not None:
        right = {
            "right class, samples": float((judge.predict(x.numpy()) == asked.numpy()).mean()),
            "right class, unseen images": float((judge.predict(images[held].numpy()) == labels[held].numpy()).mean()),
        }
    return right | {
        "mean, samples": float(x.mean()),
        "mean, images": float(images.mean()),
        "deviation, samples": float(x.std()),
        "deviation, images": float(images.std()),
        "distance to the nearest image, samples": float(near.median()),
        "distance to the nearest other image, images": float(own.median()),
    }
