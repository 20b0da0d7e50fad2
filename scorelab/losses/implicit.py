"""Score matching without a known score, by integration by parts; summed over dimensions, with the half.

    implicit   1/2 ||s||^2 + tr(grad s)                      Hyvarinen, Estimation of Non-Normalized Statistical Models
                                                             by Score Matching, 2005
    sliced     mean over v of v' grad s v + 1/2 (v's)^2      Song et al., Sliced Score Matching, 2019, arXiv:1905.07088
               or with 1/2 ||s||^2, of less variance

In expectation each is 1/2 E ||s - grad log p||^2 minus the constant 1/2 E ||grad log p||^2.

As objectives both are taken of noised data x0 + sigma eps and multiplied by 2 sigma^2 / D: then they are, but for a
constant of the data at every level, what denoising score matching is in expectation, and the same weights fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from scorelab import divergence
from scorelab.checks import broadcast, check_batch, widened
from scorelab.losses.base import Objective, conditioned
from scorelab.losses.denoising import Weighting
from scorelab.sigmas import SigmaDistribution
from scorelab.typing import Batch, ScoreFn, Tensor

__all__ = ["Implicit", "Sliced", "implicit_loss", "sliced_loss"]


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


@dataclass(frozen=True)
class Implicit(Objective):
    """Implicit score matching at noise levels, with the exact trace: a backward pass a dimension."""

    sigmas: SigmaDistribution
    weight: Weighting = torch.ones_like

    def levels(self, u: Tensor) -> Tensor:
        return self.sigmas(u)

    def losses(self, score: Callable[..., Tensor], batch: Batch, u: Tensor, noise: Tensor) -> Tensor:
        sigma = self.levels(u).to(widened(batch.x0))
        x = (batch.x0 + broadcast(sigma, batch.x0) * self._part(noise, 0)).to(batch.x0.dtype)
        loss = self._loss(conditioned(score, batch.condition), x, sigma, noise)
        return self.weight(sigma) * 2 * sigma**2 / x[0].numel() * loss

    def _part(self, noise: Tensor, k: int) -> Tensor:
        return noise if self.draws == 1 else noise[:, k]

    def _loss(self, score: ScoreFn, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        return implicit_loss(score, x, sigma)


@dataclass(frozen=True)
class Sliced(Implicit):
    """Sliced score matching at noise levels, with ``probes`` random signs and as many backward passes."""

    probes: int = 1
    variance_reduced: bool = True

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"probes is {self.probes}; expected at least 1")

    @property
    def draws(self) -> int:  # type: ignore[override]
        """One for the noise and one for each probe."""
        return 1 + self.probes

    def _loss(self, score: ScoreFn, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        probes = torch.stack([self._part(noise, 1 + k).sign() for k in range(self.probes)])
        return sliced_loss(score, x, sigma, probes, variance_reduced=self.variance_reduced)
