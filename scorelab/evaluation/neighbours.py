"""Fidelity and diversity by nearest neighbours: precision and recall (Kynkaanniemi et al., 2019, arXiv:1904.06991),
density and coverage (Naeem et al., 2020, arXiv:2002.09797)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from scorelab.checks import doubled
from scorelab.evaluation.estimates import Estimate, as_features
from scorelab.typing import Tensor

__all__ = ["Manifold", "manifold"]

_AT_ONCE = 2**24
"""Distances."""


class Manifold(NamedTuple):
    """``precision``: the share of samples within a ball of the data; ``recall``: of the data within a ball of the
    samples; ``density``: how many balls of the data hold a sample, as a share of k; ``coverage``: the share of the data
    whose ball holds a sample. Balls reach to the k-th neighbour. Samples of the data's own law have all near 1 but
    coverage, which is 1 - (1/2)^k of large sets, and precision and recall, which depend on dimension. Errors are those
    of a share of that many rows, given the balls."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifold(x: Tensor, data: Tensor, *, k_pr: int = 3, k_dc: int = 5) -> Manifold:
    """Of samples x (N, D) beside data (M, D), both features. k_pr, k_dc: neighbours for precision and recall, and for
    density and coverage, as published.

    Raises ValueError for sets that do not fit, or of no more rows than neighbours.
    """
    x, data = as_features(x, "x"), as_features(data, "data", x.shape[1:])
    most = max(k_pr, k_dc)
    if min(k_pr, k_dc) < 1 or min(len(x), len(data)) <= most:
        raise ValueError(
            f"k is {k_pr} and {k_dc}, of {len(x)} and {len(data)} rows; expected 1 or more, and fewer than rows"
        )
    centre = doubled(data[:: max(1, len(data) // 10_000)]).mean(0)
    a, b = (doubled(z) - centre for z in (x, data))
    own, theirs = _radii(a, k_pr)[:, -1], _radii(b, most)
    balls_pr, balls_dc = theirs[:, k_pr - 1], theirs[:, k_dc - 1]
    held, counts = torch.zeros(len(a), dtype=torch.bool, device=a.device), torch.zeros_like(own)
    recalled = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    covered = torch.zeros_like(recalled)
    for first in range(0, len(a), size := max(1, _AT_ONCE // len(b))):
        some = slice(first, first + size)
        apart = torch.cdist(a[some], b)
        held[some] = (apart <= balls_pr).any(1)
        counts[some] = (apart <= balls_dc).sum(1).to(counts)
        recalled |= (apart <= own[some, None]).any(0)
        covered |= (apart <= balls_dc).any(0)
    density = Estimate(float(counts.mean()) / k_dc, float(counts.std()) / k_dc / math.sqrt(len(counts)))
    return Manifold(_share(held), _share(recalled), density, _share(covered))


def _share(true: Tensor) -> Estimate:
    """Its error by Agresti and Coull (1998), two more of each kind: of none or of all it is not 0."""
    count, number = int(true.sum()), len(true)
    near = (count + 2) / (number + 4)
    return Estimate(count / number, math.sqrt(near * (1 - near) / (number + 4)))


def _radii(z: Tensor, k: int) -> Tensor:
    """Distances of each row's 1st to k-th neighbour among the others, (N, k)."""
    found = []
    for first in range(0, len(z), size := max(1, _AT_ONCE // len(z))):
        apart = torch.cdist(z[first : first + size], z)
        apart.diagonal(first).fill_(math.inf)
        found.append(apart.topk(k, largest=False).values)
    return torch.cat(found)
