"""Score matching without a known score, by integration by parts; summed over dimensions, with the half.

    implicit   1/2 ||s||^2 + tr(grad s)                      Hyvarinen, Estimation of Non-Normalized Statistical Models
                                                             by Score Matching, 2005
    sliced     mean over v of v' grad s v + 1/2 (v's)^2      Song et al., Sliced Score Matching, 2019, arXiv:1905.07088
               or with 1/2 ||s||^2, of less variance

In expectation each is 1/2 E ||s - grad log p||^2 minus the constant 1/2 E ||grad log p||^2.
"""

from __future__ import annotations

import torch

from scorelab import divergence
from scorelab.checks import check_batch
from scorelab.typing import ScoreFn, Tensor

__all__ = ["implicit_loss", "sliced_loss"]


def implicit_loss(score: ScoreFn, x: Tensor, sigma: Tensor, *, probes: Tensor | None = None) -> Tensor:
    """The loss of each sample (B,), with the exact trace or Hutchinson ``probes`` (P, B, *D); keeps the graph."""
    check_batch(x)
    if probes is None:
        value, trace = divergence.exact(lambda y: score(y, sigma), x, create_graph=True)
    else:
        value, trace, _ = divergence.hutchinson(lambda y: score(y, sigma), x, probes, create_graph=True)
    return 0.5 * value.flatten(1).square().sum(1) + trace


def sliced_loss(score: ScoreFn, x: Tensor, sigma: Tensor, probes: Tensor, *, variance_reduced: bool = True) -> Tensor:
    """The loss of each sample (B,), averaged over probes (P, B, *D) with E[v v'] = I; keeps the graph.

    ``variance_reduced`` puts 1/2 ||s||^2 for 1/2 (v's)^2, its expectation.
    """
    check_batch(x)
    value, trace, _ = divergence.hutchinson(lambda y: score(y, sigma), x, probes, create_graph=True)
    if variance_reduced:
        return 0.5 * value.flatten(1).square().sum(1) + trace
    return 0.5 * torch.stack([(value * v).flatten(1).sum(1) ** 2 for v in probes]).mean(0) + trace
