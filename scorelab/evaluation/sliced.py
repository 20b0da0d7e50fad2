"""The sliced Wasserstein distance: Bonneel et al., Sliced and Radon Wasserstein Barycenters, 2015."""

from __future__ import annotations

import math

import torch

from scorelab.evaluation.estimates import GROUPS, Estimate, as_features, jackknifed, parts
from scorelab.typing import Tensor

__all__ = ["sliced_wasserstein"]


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, projections: int = 256, generator: torch.Generator | None = None
) -> Estimate:
    """The mean over directions of the squared 2-Wasserstein distance of projections, of x (N, *D) and y (M, *D), in
    squared units.

    The value is the jackknife's over 20 groups of rows, which takes the bias of order 1/N away, so that it is about 0,
    and may be negative, for sets of one law. The error is the delta method's: the distance changes with a row by
    Kantorovich's potential, whose slope is 2 (x - T(x)), T the map onto the other set. generator: of the directions;
    seed 0 by default, so that numbers compare. Raises ValueError for sets that do not fit, or of fewer than 40 rows.
    """
    x, y = as_features(x, "x"), as_features(y, "y", x.shape[1:])
    if min(len(x), len(y)) < 2 * GROUPS or projections < 1:
        raise ValueError(
            f"got {len(x)} and {len(y)} rows, {projections} projections; expected at least {2 * GROUPS} rows and 1 "
            "projection"
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    ways = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64, device=generator.device)
    ways = ways / ways.norm(dim=0)
    a, b = (z.double() @ ways.to(z.device) for z in (x, y))
    a, b = a - b.mean(0), b - b.mean(0)
    # projections sorted once: of a group's removal a mask of the sorted rows
    (a, order_a), (b, order_b) = a.sort(0), b.sort(0)
    group_a, group_b = (parts(len(z), GROUPS).to(z.device)[o] for z, o in ((a, order_a), (b, order_b)))
    left = []
    for k in range(GROUPS):
        kept = [z.T[(g != k).T].reshape(projections, -1).T for z, g in ((a, group_a), (b, group_b))]
        left.append(_squared(*kept))
    value = jackknifed(_squared(a, b), left).value
    variance = sum(_variance(*z) for z in ((a, b, order_a), (b, a, order_b)))
    return Estimate(value, math.sqrt(variance))


def _variance(a: Tensor, b: Tensor, order: Tensor) -> float:
    """Of the distance as the first set is drawn again, from both sorted and the rows that its values are of."""
    place = (torch.arange(len(a), dtype=torch.float64, device=a.device) + 0.5) / len(a)
    slope = 2 * (a - b[(place * len(b)).long()])
    steps = (slope[1:] + slope[:-1]) / 2 * torch.diff(a, dim=0)
    potential = torch.cat([torch.zeros_like(a[:1]), steps.cumsum(0)])
    changes = torch.empty_like(a).scatter_(0, order, potential).mean(1)
    return float(changes.var()) / len(a)


def _squared(a: Tensor, b: Tensor) -> float:
    """Mean over columns of int_0^1 (F_a^-1(q) - F_b^-1(q))^2 dq, of sorted (N, P) and (M, P)."""
    if len(a) == len(b):
        return float((a - b).square().mean())
    ends = torch.cat([torch.arange(1, len(z) + 1, dtype=torch.float64, device=a.device) / len(z) for z in (a, b)])
    ends = ends.sort().values
    width = torch.diff(ends, prepend=ends.new_zeros(1))
    middle = ends - width / 2
    i, j = ((middle * len(z)).long().clamp_max(len(z) - 1) for z in (a, b))
    return float(((a[i] - b[j]).square().mean(1) * width).sum())
