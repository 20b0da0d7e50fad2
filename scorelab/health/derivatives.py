"""What the derivatives of a score say of it: whether it is a gradient, whether its levels belong together, and how many
dimensions data has.

J = I + sigma^2 ds/dx, the Jacobian of x0_hat, is symmetric for a score. The densities of x = x0 + sigma eps obey the
heat equation, dp/dsigma = sigma div grad p, so their scores obey (Lai et al., FP-Diffusion, 2023, arXiv:2210.04296)

    ds/dsigma = sigma grad(div s + |s|^2)

Where data lies on d dimensions, log p(x; sigma) near it falls as sigma^(d - D), so (Kamkari et al., A Geometric View of
Data Complexity, 2024, arXiv:2406.03537)

    d = D + d log p(x; sigma) / d log sigma = D + sigma^2 (div s + |s|^2)        at x0, for small sigma
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from scorelab.checks import call, doubled, level
from scorelab.divergence import kernels, leaf, rademacher
from scorelab.evaluation import Estimate
from scorelab.typing import ScoreFn, Tensor

__all__ = ["Derivatives", "derivatives"]

_PROBES = 4
_APART = 0.02
"""Between two levels whose difference stands for a derivative, of their logarithm."""


class Derivatives(NamedTuple):
    """At a noise level: ``trace``, of J at noised points, (N,). ``dimension``: d at the data. ``asymmetry``:
    |J - J'| / (2 |J|) by Frobenius norms, 0 to 1. ``fokker_planck``: the root mean square of the left side minus the
    right, as a share of the left's; None for a score that knows no levels between its own."""

    trace: Tensor
    dimension: Estimate
    asymmetry: float
    fokker_planck: float | None


def derivatives(
    score: ScoreFn, x: Tensor, x0: Tensor, sigma: float, *, between: bool, generator: torch.Generator
) -> Derivatives | None:
    """Of a score at noised points x (N, *D) and their data x0; None of one that autograd can't follow.

    between: whether it knows all levels around sigma.
    """

    def at(z: Tensor, s: float) -> Tensor:
        return call(score, z, level(s, z))  # type: ignore[no-any-return]

    with torch.enable_grad(), kernels(twice=True):
        z = leaf(x)
        s = at(z, sigma)
        if not s.requires_grad:
            return None
        out = z + sigma**2 * s
        apart, size, trace = 0.0, 0.0, torch.zeros(len(x), device=x.device)
        weights = torch.zeros_like(out, requires_grad=True)
        (back,) = torch.autograd.grad(out, z, weights, create_graph=True)
        for k in range(_PROBES):
            v = rademacher(tuple(x.shape), x, generator)
            (transposed,) = torch.autograd.grad(out, z, v, retain_graph=True)
            # back is J' w, linear in w, and its transpose J
            forward = transposed
            if back.requires_grad:
                (forward,) = torch.autograd.grad(back, weights, v, retain_graph=k < _PROBES - 1)
            apart += float(doubled(forward - transposed).square().sum())
            size += float(doubled(forward).square().sum() + doubled(transposed).square().sum())
            trace += (v * transposed).flatten(1).sum(1) / _PROBES
        clean = leaf(x0)
        out = at(clean, sigma)
        squares = sigma**2 * out.detach().flatten(1).square().sum(1)
        for k in range(_PROBES):
            v = rademacher(tuple(x.shape), x, generator)
            (turned,) = torch.autograd.grad(out, clean, v, retain_graph=k < _PROBES - 1)
            squares += (x0[0].numel() + sigma**2 * (v * turned).flatten(1).sum(1)) / _PROBES
    dimension = Estimate(float(squares.mean()), float(squares.std()) / math.sqrt(len(x)))
    residual = _residual(at, x, sigma, generator) if between else None
    return Derivatives(trace.detach(), dimension, math.sqrt(apart / (2 * size)) if size else 0.0, residual)


def _residual(at: Callable[[Tensor, float], Tensor], x: Tensor, sigma: float, generator: torch.Generator) -> float:
    """The root of a mean of products of two residuals, whose divergences are of independent probes: their noise is not
    in it."""
    up, down = sigma * math.exp(_APART / 2), sigma * math.exp(-_APART / 2)
    with torch.no_grad():
        left = (at(x, up) - at(x, down)) / (up - down)
    sides = []
    with torch.enable_grad(), kernels(twice=True):
        for _ in range(2):
            z = leaf(x)
            s, v = at(z, sigma), rademacher(tuple(x.shape), x, generator)
            (turned,) = torch.autograd.grad(s, z, v, create_graph=True)
            (right,) = torch.autograd.grad((v * turned).sum() + s.square().sum(), z)
            sides.append(doubled(left - sigma * right))
    both, whole = float((sides[0] * sides[1]).sum()), float(doubled(left).square().sum())
    return math.sqrt(max(0.0, both) / whole) if whole else 0.0
