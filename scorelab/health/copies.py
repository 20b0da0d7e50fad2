"""Whether samples are copies of what a model was trained on, against data of the same law that it was not.

Each sample's nearest neighbour among training and held-out data together is a training sample with a chance that
depends, for a model that knows only the data's law, on the numbers of both alone: which of the data were held out is
then a matter of lots, whatever the law of the samples is (blurred ones, or ones of a single class, are no copies). With
c_j samples nearest to datum j, n of them in all, N training and M held-out data, the number nearest to training data
has under such lots

    mean n N/(N+M),     variance N M / ((N+M)(N+M-1)) sum_j (c_j - n/(N+M))^2

(of a sum over a random subset; the copies of one datum do not count as independent). Beside this test of permutations
are the published statistics:

authenticity   the share of samples that are farther from their nearest training datum than that is from its own nearest
               (Alaa et al., How Faithful is your Synthetic Data?, 2022, arXiv:2102.08921)
C_T            whether samples are nearer to training data than held-out data are, a z-scored Mann-Whitney statistic in
               each cell of a clustering, averaged; below -3 is copying (Meehan et al., A Non-Parametric Test to Detect
               Data-Copying in Generative Models, 2020, arXiv:2004.05675). Smooth samples lie nearer too.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.stats import rankdata

from scorelab.checks import doubled
from scorelab.evaluation import Estimate, nearest_distances
from scorelab.evaluation.estimates import as_features
from scorelab.typing import Tensor

__all__ = ["Copies", "copies"]

_DIRECTIONS = 64
_ROWS = 2000
"""Training data that the directions are of, about."""
_CELLS = 5
"""Of C_T; fewer where data are few, so that each has 20 of samples and of held-out data on average."""


class Copies(NamedTuple):
    """``p``: of the test, that a model which knows the data's law only has so many samples nearest to training data;
    ``share``: how many more there are, as a share of those that could be (1: all samples are nearest to training data);
    ``authentic``: of the samples, and ``authentic_held`` of the held-out data; ``c_t``."""

    p: float
    share: Estimate
    authentic: Estimate
    authentic_held: Estimate
    c_t: float


Nearest = tuple[Tensor, Tensor]


def copies(
    x: Tensor, train: Tensor, held: Tensor, *, of_samples: Nearest | None = None, of_held: Nearest | None = None
) -> Copies:
    """Of samples x (n, *D), training data (N, *D) and held-out data (M, *D), as pixels or features. of_samples,
    of_held: their ``nearest_distances`` to training data, where these are known.

    Raises ValueError for sets that do not fit, or of fewer than 20 rows.
    """
    train, held = (as_features(z, name, x.shape[1:]) for z, name in ((train, "train"), (held, "held")))
    x = as_features(x, "x")
    if min(len(x), len(train), len(held)) < 20:
        raise ValueError(f"there are {len(x)}, {len(train)} and {len(held)} rows; expected at least 20 of each")
    n, seen, unseen = len(x), len(train), len(held)
    both = seen + unseen
    nearest, index = nearest_distances(x, train) if of_samples is None else of_samples
    theirs, its = nearest_distances(held, train) if of_held is None else of_held
    apart, other = nearest_distances(x, held)
    counts = torch.zeros(both, dtype=torch.float64)
    # ties, such as of data that both sets hold, are halved: by turns
    first = torch.where(nearest == apart, torch.arange(n, device=x.device) % 2 == 0, nearest < apart)
    counts.index_add_(0, torch.where(first, index, seen + other).cpu(), torch.ones(n, dtype=torch.float64))
    expected = n * seen / both
    variance = seen * unseen / (both * (both - 1)) * float((counts - n / both).square().sum())
    excess = float(counts[:seen].sum()) - expected
    # where every datum has as many samples nothing is in excess
    room, spread = n - expected, math.sqrt(variance) or 1.0
    # of the training data that are anyone's nearest
    asked, place = torch.unique(torch.cat([index, its]), return_inverse=True)
    own = nearest_distances(train[asked], train, same=asked)[0][place]
    return Copies(
        NormalDist().cdf(-excess / spread),
        Estimate(excess / room, spread / room),
        _share(nearest > own[:n]),
        _share(theirs > own[n:]),
        _c_t(x, nearest, held, theirs, train),
    )


def _share(true: Tensor) -> Estimate:
    share = float(doubled(true).mean())
    return Estimate(share, math.sqrt(max(share * (1 - share), 1 / len(true)) / len(true)))


def _c_t(x: Tensor, nearest: Tensor, held: Tensor, of_held: Tensor, train: Tensor) -> float:
    """Cells by the nearest of centres of the training data, in the directions in which it varies most."""
    flat = train.cpu().double()
    centre = flat.mean(0)
    # of few dimensions these are all of them, turned, which no distance sees
    some = flat[:: max(1, len(flat) // _ROWS)] - centre
    directions = torch.linalg.svd(some, full_matrices=False).Vh[:_DIRECTIONS].T
    reduced = [((z.cpu().double() - centre) @ directions).numpy() for z in (train, x, held)]
    cells = max(1, min(_CELLS, min(len(x), len(held)) // 20))
    centres, _ = kmeans2(reduced[0], cells, seed=0, minit="++")
    mine, theirs = (((z[:, None] - centres) ** 2).sum(2).argmin(1) for z in reduced[1:])
    total = weight = 0.0
    for k in range(cells):
        a, b = nearest.cpu().numpy()[mine == k], of_held.cpu().numpy()[theirs == k]
        if len(a) < 5 or len(b) < 5:
            continue
        total += len(b) * _mann_whitney(a, b)
        weight += len(b)
    return total / weight if weight else 0.0


def _mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """How much larger the first are, in standard deviations of a law that is the same."""
    n, m = len(a), len(b)
    u = float(rankdata(np.concatenate([a, b]))[:n].sum()) - n * (n + 1) / 2
    return (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
