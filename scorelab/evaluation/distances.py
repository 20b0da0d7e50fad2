"""Nearest neighbours, and the divergence of a model from a distribution that is known."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from scorelab.checks import check_batch, doubled
from scorelab.distributions import Distribution
from scorelab.distributions.base import CHUNK
from scorelab.likelihood import log_likelihood
from scorelab.noise import fresh_generator, randn
from scorelab.typing import ScoreFn, Tensor

__all__ = ["KL", "kl_to_model", "nearest_distances"]


def nearest_distances(x: Tensor, data: Tensor, *, same: bool | Tensor = False) -> tuple[Tensor, Tensor]:
    """Euclidean distance of each x (B, *D) to its nearest neighbour in data (N, *D), and that one's index, both (B,).

    ``same``: x is the data itself, or these of its points (B,); each point's own copy does not count.
    """
    check_batch(x, "x")
    check_batch(data, "data", tuple(x.shape[1:]))
    own = same if isinstance(same, Tensor) else torch.arange(len(x)) if same else None
    a, b = _centred(x, data)
    values, indices = [], []
    for start in range(0, max(1, len(a)), size := max(1, CHUNK // max(1, len(b)))):
        distances = torch.cdist(a[start : start + size], b)
        if own is not None:
            some = own[start : start + size].to(distances.device)
            distances[torch.arange(len(some), device=distances.device), some] = math.inf
        least = distances.min(1)
        values.append(least.values)
        indices.append(least.indices)
    return torch.cat(values).to(x), torch.cat(indices).to(x.device)


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (N, D) in float64 around the mean of y: distances by matrix products lose the digits of an offset."""
    a, b = (doubled(z.flatten(1)) for z in (x, y))
    centre = b.mean(0)
    return a - centre, b - centre


class KL(NamedTuple):
    """KL(data || model) in nats with its standard error, over ``points`` fresh points; ``nfe`` evaluations."""

    value: float
    stderr: float
    points: int
    nfe: int


def kl_to_model(
    distribution: Distribution,
    score: ScoreFn,
    sigma_min: float,
    sigma_max: float,
    *,
    count: int = 4000,
    data_std: float = 0.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> KL:
    """KL(p(.; sigma_min) || model) = E[log p(x; sigma_min) - log p_model(x; sigma_min)], x drawn from p(.; sigma_min).

    The model's density comes from the probability-flow ODE with exact traces and the prior
    N(m, (sigma_max^2 + data_std^2) I), which is part of the model.
    """
    generator = fresh_generator() if generator is None else generator
    x = distribution.sample(count, generator)
    x = x + sigma_min * randn(tuple(x.shape), x, generator)
    model = log_likelihood(score, x, sigma_min, sigma_max, data_std=data_std, rtol=rtol, atol=atol)
    gap = distribution.log_prob(x, sigma_min).double() - model.log_prob.double()
    return KL(float(gap.mean()), float(gap.std()) / math.sqrt(count), count, model.nfe)
