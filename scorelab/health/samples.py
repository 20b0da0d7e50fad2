"""Whether samples are like data: its brightness and contrast, its range, its classes, and no copies of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import chdtrc

from scorelab.checks import doubled
from scorelab.evaluation import Estimate, nearest_distances
from scorelab.health.copies import Copies, copies
from scorelab.health.levels import as_batch
from scorelab.typing import Batch, Tensor

__all__ = ["Channel", "Class", "SampleHealth", "sample_health"]


@dataclass(frozen=True)
class Channel:
    """Of a channel: the samples' mean less the data's, in deviations of the data; their deviation over the data's; how
    much of the data's values lies beyond all of the samples', below and above."""

    mean: Estimate
    contrast: Estimate
    below: float
    above: float


@dataclass(frozen=True)
class Class:
    """Of a class: its share of the samples, and of the held-out data, both by their nearest training data; of samples
    that were asked for by class instead how many of its own are taken for it, and of the data's."""

    share: Estimate
    of_data: Estimate


@dataclass(frozen=True)
class SampleHealth:
    """``channels`` and ``classes`` (none without labels), ``classes_of`` what these are shares of; ``p_classes``: that
    samples have the data's shares, by a chi-squared test (None where they were asked for by class); ``copies``: None
    without held-out data."""

    channels: list[Channel]
    classes: list[Class]
    classes_of: str
    p_classes: float | None
    copies: Copies | None


def sample_health(
    x: Tensor, train: Tensor | Batch, held: Tensor | Batch | None = None, *, asked: Tensor | None = None
) -> SampleHealth:
    """Of samples x (n, *D) beside training and held-out data, as they are shown; asked: the classes of the samples
    (n,), where they were asked for. Without held-out data they are compared with training data, and copies not looked
    for. Labels are whole numbers (N,), beside data in a ``Batch``.

    Raises ValueError for sets that do not fit.
    """
    x = as_batch(x, "x").x0
    seen, unseen = as_batch(train, "train", x), None if held is None else as_batch(held, "held", x)
    beside = seen if unseen is None else unseen
    if asked is not None and asked.shape != (len(x),):
        raise ValueError(f"asked is {tuple(asked.shape)} for {len(x)} samples; expected the class of each")
    channels = [_channel(x[:, c], beside.x0[:, c]) for c in range(x.shape[1])]
    mine = nearest_distances(x, seen.x0)
    theirs = nearest_distances(beside.x0, seen.x0, same=unseen is None)
    classes, p = _classes(mine[1], theirs[1], seen, beside, asked)
    few = unseen is None or min(len(x), len(unseen.x0), len(seen.x0)) < 20
    found = None if unseen is None or few else copies(x, seen.x0, unseen.x0, of_samples=mine, of_held=theirs)
    return SampleHealth(channels, classes, "the samples" if asked is None else "those asked for", p, found)


def _channel(x: Tensor, data: Tensor) -> Channel:
    a, b = (z.flatten(1).cpu().double() if z.ndim > 1 else z.cpu().double().unsqueeze(1) for z in (x, data))
    std = max(float(b.std()), 1e-12)
    gap = (float(a.mean()) - float(b.mean())) / std
    error = math.hypot(*(float(z.mean(1).std()) / math.sqrt(len(z)) for z in (a, b))) / std
    ratio = float(a.std()) / std
    squares = [(z - float(z.mean())).square().mean(1) for z in (a, b)]
    relative = math.hypot(*(float(s.std()) / math.sqrt(len(s)) / max(float(s.mean()), 1e-24) for s in squares)) / 2
    below, above = float(doubled(b < a.min()).mean()), float(doubled(b > a.max()).mean())
    return Channel(Estimate(gap, error), Estimate(ratio, ratio * relative), below, above)


def _classes(
    mine: Tensor, theirs: Tensor, train: Batch, data: Batch, asked: Tensor | None
) -> tuple[list[Class], float | None]:
    """By the nearest training data of the samples, ``mine``, and of the data, ``theirs``."""
    if train.condition is None or data.condition is None or train.condition.ndim != 1:
        return [], 1.0
    count = int(torch.cat([train.condition, data.condition]).max()) + 1
    taken, of_data = (train.condition.cpu()[nearest.cpu()] for nearest in (mine, theirs))
    if asked is not None:
        own = data.condition.cpu()
        right = [(taken[asked.cpu() == k] == k, of_data[own == k] == k) for k in range(count)]
        return [Class(_part(a), _part(b)) for a, b in right], None
    n, m = len(taken), len(of_data)
    shares = [((taken == k), (of_data == k)) for k in range(count)]
    # of two sets: with the pooled shares what both would be expected to have
    statistic, free = 0.0, -1
    for a, b in shares:
        both = int(a.sum()) + int(b.sum())
        if both:
            free += 1
            for found, size in ((int(a.sum()), n), (int(b.sum()), m)):
                wanted = both * size / (n + m)
                statistic += (found - wanted) ** 2 / wanted
    return [Class(_part(a), _part(b)) for a, b in shares], float(chdtrc(free, statistic)) if free > 0 else 1.0


def _part(true: Tensor) -> Estimate:
    """A share, its error with two more of each kind: of none it is not 0."""
    if not len(true):
        return Estimate(math.nan, math.inf)
    near = (float(true.sum()) + 2) / (len(true) + 4)
    return Estimate(float(doubled(true).mean()), math.sqrt(near * (1 - near) / (len(true) + 4)))
